"""Files of HTTP clients in Redis: a record, and bytes that are read and written piece by piece.

A content is written first, and is nobody's until its record is made; left alone it expires.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

from redis import Redis

from mixfleet_broker.errors import BrokerError
from mixfleet_broker.keys import FILE, FILE_CONTENT, OWN_FILES
from mixfleet_broker.lua import Scripts, milliseconds
from mixfleet_broker.redis_errors import redis_errors

MAX_FILES: Final = 1000
"""Of one tenant."""
_UPLOAD_TTL_MS: Final = 3_600_000
_ID: Final = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as it is now."""

    file_id: str
    tenant: str
    """Whose it is."""
    filename: str
    purpose: str
    batch_id: str | None
    """Of the batch that writes it; None for an upload."""
    num_bytes: int
    created_at: int
    """Unix time, as the next."""
    expires_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesFull:
    """A tenant has no room for another file."""

    unit: str
    """``files``, ``bytes``, or ``batches`` where no batch can be added."""
    held: int
    limit: int


class FileStore:
    """All files on one server. Safe to share between threads.

    Args:
        redis: A client whose replies are bytes.
        prefix: Before all keys.

    Raises:
        BrokerError: From every method, see :mod:`mixfleet_broker.redis_errors`.
    """

    def __init__(self, redis: Redis, *, prefix: str = "") -> None:
        self._redis = redis
        self._prefix = prefix
        self._scripts = Scripts(redis, prefix)

    def upload(self, file_id: str, piece: bytes) -> None:
        """Write the next bytes of a content that has no record yet."""
        name = FILE_CONTENT(file_id, prefix=self._prefix)
        with redis_errors(), self._redis.pipeline(transaction=False) as pipeline:
            pipeline.append(name, piece)
            pipeline.pexpire(name, _UPLOAD_TTL_MS)
            pipeline.execute()

    def add(
        self, file_id: str, tenant: str, fields: Mapping[str, str], *, ttl_s: float, max_bytes: int
    ) -> FilesFull | None:
        """Make a file of what was uploaded.

        Args:
            file_id: Of :func:`new_file_id`.
            tenant: Whose it is.
            fields: ``filename`` and ``purpose``.
            ttl_s: How long it is kept.
            max_bytes: What the tenant's other files may hold.

        Returns:
            None once it is there; why not otherwise. Then the content is gone.
        """
        flat = [part for pair in fields.items() for part in pair]
        with redis_errors():
            what, *held = self._scripts.run(
                "file_add",
                file_id,
                tenant,
                milliseconds(ttl_s),
                MAX_FILES,
                max_bytes,
                *flat,
            )
        if what == b"added":
            return None
        self.delete(file_id)
        limit = MAX_FILES if what == b"files" else max_bytes
        return FilesFull(unit=what.decode(), held=held[0], limit=limit)

    def find(self, file_id: str) -> StoredFile | None:
        """Return a file; None where there is none, or no more."""
        return self._find([file_id])[0] if is_file_id(file_id) else None

    def own(self, tenant: str) -> list[StoredFile]:
        """Return a tenant's files, the latest first."""
        name = OWN_FILES(tenant, prefix=self._prefix)
        with redis_errors():
            ids: Any = self._redis.zrevrange(name, 0, MAX_FILES)
        return [file for file in self._find([i.decode() for i in ids]) if file is not None]

    def read(self, file_id: str, begin: int, num_bytes: int) -> bytes:
        """Return bytes of a file from a place on; fewer at its end, none behind it."""
        name = FILE_CONTENT(file_id, prefix=self._prefix)
        with redis_errors():
            found: Any = self._redis.getrange(name, begin, begin + num_bytes - 1)
        return bytes(found)

    def delete(self, file_id: str) -> bool:
        """Forget a file, or what was uploaded of it; False if there was no record."""
        with redis_errors():
            return bool(self._scripts.run("file_delete", file_id))

    def _find(self, file_ids: list[str]) -> list[StoredFile | None]:
        with redis_errors(), self._redis.pipeline(transaction=False) as pipeline:
            for file_id in file_ids:
                pipeline.hgetall(FILE(file_id, prefix=self._prefix))
                pipeline.strlen(FILE_CONTENT(file_id, prefix=self._prefix))
            replies = pipeline.execute()
        pairs = zip(replies[::2], replies[1::2], strict=True)
        return [_file(i, *pair) for i, pair in zip(file_ids, pairs, strict=True)]


def new_file_id() -> str:
    """Return an id that nobody can guess."""
    return f"file-{uuid4().hex}"


def is_file_id(text: str) -> bool:
    """Whether a text has the form of a file's id."""
    return _ID.fullmatch(text) is not None


def _file(file_id: str, content: dict[bytes, bytes], num_bytes: int) -> StoredFile | None:
    if not content:
        return None
    try:
        fields = {name.decode(): value.decode() for name, value in content.items()}
        return StoredFile(
            file_id=file_id,
            tenant=fields["tenant"],
            filename=fields["filename"],
            purpose=fields["purpose"],
            batch_id=fields.get("batch"),
            num_bytes=num_bytes,
            created_at=int(fields["created_ms"]) // 1000,
            expires_at=int(fields["expires_ms"]) // 1000,
        )
    except (KeyError, ValueError) as error:
        raise BrokerError(f"record of {file_id} cannot be read: {error!r}") from error
