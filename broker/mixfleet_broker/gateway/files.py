"""OpenAI's ``/v1/files``: requests for batches, and their results while they come."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Query, Request
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response

from mixfleet_broker.batch_store import ENDS, BatchStore
from mixfleet_broker.file_store import (
    MAX_FILES,
    FilesFull,
    FileStore,
    StoredFile,
    new_file_id,
)
from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.gateway.batch_requests import CHAT, COMPLETIONS
from mixfleet_broker.gateway.batch_shapes import file_value, page_value
from mixfleet_broker.gateway.caller import Caller
from mixfleet_broker.gateway.service import Service
from mixfleet_broker.settings import Settings

router = APIRouter(prefix="/v1/files", tags=["openai"])

_PIECE_BYTES: Final = 256 << 10
_FORM_BYTES: Final = 64 << 10
"""Of a form beside its file."""
_LOOK_S: Final = 0.25
"""How often a file that is followed is looked at."""
_MIN_KEPT_S: Final = 3600
_MAX_KEPT_S: Final = 2_592_000
_MAX_NAME: Final = 255


def body_limits(settings: Settings) -> dict[str, int]:
    """Return the largest bodies of the paths that take files."""
    limit = settings.batch_max_bytes
    whole = dict.fromkeys((f"{CHAT}/batch", f"{COMPLETIONS}/batch"), limit)
    return {"/v1/files": limit + _FORM_BYTES, **whole}


@router.post("")
async def create(request: Request) -> Response:
    """Keep a file of requests for batches, sent as a form with ``file`` and ``purpose``."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        text = "the body must be a form (multipart/form-data) with the fields file and purpose"
        raise ApiError(400, text, code="invalid_form")
    async with request.form(max_files=1, max_fields=8) as form:
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise ApiError(400, "file: is missing", code="invalid_value", param="file")
        if purpose != "batch":
            text = f"purpose: {str(purpose)[:40]!r}, must be batch: other files have no use here"
            raise ApiError(400, text, code="unsupported_value", param="purpose")
        kept_s = _kept_s(form.get("expires_after[seconds]"), service.settings.batch_ttl_s)

        async def pieces() -> AsyncIterator[bytes]:
            while piece := await upload.read(_PIECE_BYTES):
                yield piece

        name = (upload.filename or "batch.jsonl")[-_MAX_NAME:]
        file = await keep_file(service, caller, pieces(), name, kept_s)
    return JSONResponse(file_value(file))


@router.get("")
async def list_files(
    request: Request,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = MAX_FILES,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List the caller's files, the latest first unless asked otherwise."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    files = await service.fleet.call(_store(service).own, caller.tenant)
    files = files if order == "desc" else files[::-1]
    found = [(f.file_id, file_value(f)) for f in files if purpose in (None, f.purpose)]
    return JSONResponse(page_value(found, after, limit))


@router.get("/{asked}")
async def retrieve(request: Request, asked: str) -> Response:
    """Return a file as it is now."""
    _, file = await _own(request, asked)
    return JSONResponse(file_value(file))


@router.delete("/{asked}")
async def delete(request: Request, asked: str) -> Response:
    """Forget a file. A batch that writes it goes on without; one that reads it fails."""
    service, file = await _own(request, asked)
    await service.fleet.call(_store(service).delete, file.file_id)
    return JSONResponse({"id": file.file_id, "object": "file", "deleted": True})


@router.get("/{asked}/content")
async def content(
    request: Request,
    asked: str,
    follow: bool = False,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """Return a file's bytes so far, from a place on, or as they come until its batch has ended."""
    service, file = await _own(request, asked)
    body = _followed(service, file, offset) if follow else _so_far(service, file, offset)
    return sse.EventStream(body, {"content-type": "application/jsonl"})


async def find_own(service: Service, caller: Caller, asked: str) -> StoredFile:
    """Return a file of the caller.

    Raises:
        ApiError: 404 if there is none, or it is somebody else's.
    """
    file = await service.fleet.call(_store(service).find, asked)
    if file is not None and caller.owns(file.tenant):
        return file
    text = f"no file {asked[:80]!r}: it never existed, was deleted, or is too old"
    raise ApiError(404, text, code="file_not_found", param="file_id")


async def keep_file(
    service: Service, caller: Caller, pieces: AsyncIterator[bytes], name: str, kept_s: float
) -> StoredFile:
    """Return a new file of the caller's, made of what comes, which is never held whole.

    Raises:
        ApiError: It has too many bytes or lines, or the caller has too many files.
    """
    store, file_id, settings = _store(service), new_file_id(), service.settings
    num_bytes = num_lines = 0
    try:
        async for piece in pieces:
            num_bytes += len(piece)
            num_lines += piece.count(b"\n")
            _check_size("bytes", num_bytes, settings.batch_max_bytes)
            # The last line need not have an end, and has not been counted if so.
            _check_size("lines", num_lines, settings.batch_max_lines)
            if piece:
                await service.fleet.call(store.upload, file_id, piece)
    except BaseException:
        await service.fleet.call(store.delete, file_id)
        raise
    fields = {"filename": name, "purpose": "batch"}
    full = await service.fleet.call(
        store.add,
        file_id,
        caller.tenant,
        fields,
        ttl_s=kept_s,
        max_bytes=settings.batch_stored_bytes,
    )
    if full is not None:
        raise no_room(full)
    return await find_own(service, caller, file_id)


def no_room(full: FilesFull) -> ApiError:
    """Return the refusal of a file or a batch that its tenant has no room for."""
    what = {
        "files": f"{full.held} files are kept already, the limit is {full.limit}",
        "bytes": f"the files kept already hold {full.held} bytes, the limit is {full.limit}",
        "batches": f"{full.held} batches are kept already, the limit is {full.limit}",
    }
    return ApiError(
        413,
        f"{what[full.unit]}: delete files, or wait until some expire",
        code="storage_full",
        details={"unit": full.unit, "held": full.held, "limit": full.limit},
    )


def _check_size(unit: str, number: int, limit: int) -> None:
    if number > limit:
        raise ApiError(
            413,
            f"the file has more than {limit} {unit}, which is the limit: send it in parts",
            code="file_too_large",
            param="file",
            details={"unit": unit, "limit": limit},
        )


def _kept_s(asked: Any, otherwise: float) -> float:
    if asked is None:
        return otherwise
    seconds = int(asked) if isinstance(asked, str) and asked.isdecimal() else 0
    if not _MIN_KEPT_S <= seconds <= _MAX_KEPT_S:
        text = f"expires_after.seconds: must be from {_MIN_KEPT_S} to {_MAX_KEPT_S}"
        raise ApiError(400, text, code="invalid_value", param="expires_after.seconds")
    return seconds


async def _own(request: Request, asked: str) -> tuple[Service, StoredFile]:
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    return service, await find_own(service, caller, asked)


async def _so_far(service: Service, file: StoredFile, begin: int) -> AsyncIterator[bytes]:
    store = _store(service)
    while begin < file.num_bytes:  # what it had when it was asked for
        num_bytes = min(_PIECE_BYTES, file.num_bytes - begin)
        piece = await service.fleet.call(store.read, file.file_id, begin, num_bytes)
        if not piece:
            return
        begin += len(piece)
        yield piece


async def _followed(service: Service, file: StoredFile, begin: int) -> AsyncIterator[bytes]:
    store, is_last = _store(service), False
    while True:
        while piece := await service.fleet.call(store.read, file.file_id, begin, _PIECE_BYTES):
            begin += len(piece)
            yield piece
        if is_last:
            return
        # It may have been written between the last read and the batch's end: read once more.
        is_last = await _is_complete(service, file)
        if not is_last:
            await asyncio.sleep(_LOOK_S)


async def _is_complete(service: Service, file: StoredFile) -> bool:
    if file.batch_id is None:
        return True
    store = BatchStore(service.fleet.redis, prefix=service.fleet.prefix)
    batch = await service.fleet.call(store.find, file.batch_id)
    return batch is None or batch.status in ENDS


def _store(service: Service) -> FileStore:
    return FileStore(service.fleet.redis, prefix=service.fleet.prefix)
