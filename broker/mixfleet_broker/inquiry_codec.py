"""Small questions to a worker and their answers: the values, their bytes and all checks.

msgpack, schema 1. Token ids travel as packed 32-bit numbers, little-endian: a million of them is
one value to check and not a million.
"""

import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from mixfleet_broker.errors import JobError, MessageError, error_from_end
from mixfleet_broker.event_codec import with_bounded_message
from mixfleet_broker.job_codec import decode_job, encode_job
from mixfleet_broker.messages import MAX_COUNT, ChatJob, JobEnd
from mixfleet_broker.packing import MAX_MESSAGE_BYTES, pack, unpack
from mixfleet_broker.schema import Fields, integer

SCHEMA_VERSION: Final = 1
MAX_INQUIRY_BYTES: Final = MAX_MESSAGE_BYTES + 1024
"""Any job that can be queued can be asked about."""
MAX_ANSWER_BYTES: Final = 8 * MAX_MESSAGE_BYTES
"""One token for each byte of the longest text, four bytes an id, and the tokens' own bytes."""
_ID_BYTES: Final = 4

Detail = Literal["count", "ids", "bytes"]
"""What is wanted of tokens: how many; also their ids; also what each stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeText:
    """Which tokens is this text?"""

    text: str
    add_special_tokens: bool = True
    """Whether BOS comes first where the model has one, as before a prompt."""
    detail: Detail = "ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeChat:
    """Which tokens is the prompt of this job? However long: its limits and settings are ignored."""

    job: ChatJob
    detail: Detail = "ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class Detokenize:
    """Which text is this?"""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckJob:
    """Would you take this job? The answer is of the prompt's size, or the job's rejection."""

    payload: bytes
    """As :func:`~mixfleet_broker.job_codec.encode_job` makes it."""


Inquiry = TokenizeText | TokenizeChat | Detokenize | CheckJob


@dataclass(frozen=True, slots=True, kw_only=True)
class InquiryAnswer:
    """What a worker says."""

    num_tokens: int
    """Of the text, the prompt, or the ids given."""
    context_length: int
    """Most tokens of prompt and answer together."""
    max_answer_tokens: int
    """Longest answer to a prompt of ``num_tokens``; of a checked job, what it asks for if less."""
    token_ids: tuple[int, ...] = ()
    token_bytes: tuple[bytes, ...] = ()
    """One per id, UTF-8 or a part of a character; a control token's spelling."""
    text: str | None = None
    """Of :class:`Detokenize` only."""


def encode_inquiry(inquiry: Inquiry) -> bytes:
    """Return the bytes of a question.

    Raises:
        MessageError: It cannot be asked; the text names the field.
    """
    data = pack({"v": SCHEMA_VERSION, **_inquiry_map(inquiry)}, limit=MAX_INQUIRY_BYTES)
    if not isinstance(inquiry, CheckJob):  # whose check is the worker's answer
        decode_inquiry(data)
    return data


def decode_inquiry(data: bytes) -> Inquiry:
    """Return the question in ``data``.

    Raises:
        MessageError: It is not of the schema.
    """
    fields = Fields(unpack(data, limit=MAX_INQUIRY_BYTES), "inquiry")
    version, kind = fields.take("v"), fields.take("kind")
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if version != SCHEMA_VERSION or read is None:
        raise MessageError(
            f"inquiry: schema {str(version)[:20]!r} of kind {str(kind)[:20]!r} is not known here, "
            f"only {SCHEMA_VERSION!r} of {', '.join(_READERS)}"
        )
    inquiry = read(fields)
    fields.done()
    return inquiry


def encode_answer(answer: InquiryAnswer) -> bytes:
    """Return the bytes of an answer.

    Raises:
        MessageError: They are more than ``MAX_ANSWER_BYTES``.
    """
    value: dict[str, object] = {
        "v": SCHEMA_VERSION,
        "n": answer.num_tokens,
        "l": answer.context_length,
        "m": answer.max_answer_tokens,
    }
    if answer.token_ids:
        value["i"] = _ids_to_bytes(answer.token_ids)
    if answer.token_bytes:
        value["b"] = list(answer.token_bytes)
    if answer.text is not None:
        value["t"] = answer.text
    return pack(value, limit=MAX_ANSWER_BYTES)


def encode_refusal(code: str, message: str) -> bytes:
    """Return the bytes of an answer that is a failure: what a job would end with."""
    end = with_bounded_message(JobEnd(state="failed", code=code, message=message))
    return pack({"v": SCHEMA_VERSION, "c": code, "e": end.message})


def decode_answer(data: bytes) -> InquiryAnswer:
    """Return the answer in ``data``.

    Raises:
        JobError: It is a refusal: the error with which such a job would end.
        MessageError: It is not of the schema.
    """
    fields = Fields(unpack(data, limit=MAX_ANSWER_BYTES), "answer")
    integer(fields.take("v"), "answer.v", SCHEMA_VERSION, SCHEMA_VERSION)
    code, message = fields.text_or_none("c"), fields.text_or_none("e")
    if code is not None:
        fields.done()
        raise _refusal(code, message)
    answer = InquiryAnswer(
        num_tokens=integer(fields.take("n"), "answer.n", 0, MAX_COUNT),
        context_length=integer(fields.take("l"), "answer.l", 0, MAX_COUNT),
        max_answer_tokens=integer(fields.take("m"), "answer.m", 0, MAX_COUNT),
        token_ids=_ids_of(fields.take("i"), "answer.i"),
        token_bytes=tuple(_bytes(item, "answer.b") for item in fields.items("b")),
        text=fields.text_or_none("t"),
    )
    fields.done()
    return answer


def _refusal(code: str, message: str | None) -> JobError:
    return error_from_end(JobEnd(state="failed", code=code, message=message))


def _inquiry_map(inquiry: Inquiry) -> dict[str, object]:
    if isinstance(inquiry, TokenizeText):
        return {
            "kind": "text",
            "text": inquiry.text,
            "special": inquiry.add_special_tokens,
            "detail": inquiry.detail,
        }
    if isinstance(inquiry, TokenizeChat):
        return {"kind": "chat", "job": encode_job(inquiry.job), "detail": inquiry.detail}
    if isinstance(inquiry, Detokenize):
        return {"kind": "ids", "ids": _ids_to_bytes(inquiry.token_ids)}
    return {"kind": "check", "job": inquiry.payload}


def _read_text(fields: Fields) -> TokenizeText:
    special = fields.take("special")
    if not isinstance(special, bool):
        raise MessageError(f"inquiry.special: must be true or false, is {type(special).__name__}")
    return TokenizeText(
        text=fields.text("text"), add_special_tokens=special, detail=_read_detail(fields)
    )


def _read_chat(fields: Fields) -> TokenizeChat:
    job = decode_job(_bytes(fields.take("job"), "inquiry.job"))
    return TokenizeChat(job=job, detail=_read_detail(fields))


def _read_ids(fields: Fields) -> Detokenize:
    return Detokenize(token_ids=_ids_of(fields.take("ids"), "inquiry.ids"))


def _read_check(fields: Fields) -> CheckJob:
    return CheckJob(payload=_bytes(fields.take("job"), "inquiry.job"))


_READERS: Final[dict[str, Callable[[Fields], Inquiry]]] = {
    "text": _read_text,
    "chat": _read_chat,
    "ids": _read_ids,
    "check": _read_check,
}


def _read_detail(fields: Fields) -> Detail:
    given = fields.text("detail")
    for known in get_args(Detail):
        if given == known:
            detail: Detail = known
            return detail
    known_ones = ", ".join(get_args(Detail))
    raise MessageError(f"inquiry.detail={given[:20]!r}: must be one of {known_ones}")


def _ids_to_bytes(token_ids: Sequence[int]) -> bytes:
    for token_id in token_ids:
        integer(token_id, "token_ids", 0, MAX_COUNT)
    return _little_endian(array("i", token_ids)).tobytes()


def _ids_of(value: object, where: str) -> tuple[int, ...]:
    data = b"" if value is None else _bytes(value, where)
    if len(data) % _ID_BYTES:
        raise MessageError(f"{where}: {len(data)} bytes, must be {_ID_BYTES} for each token id")
    found = tuple(_little_endian(array("i", data)))
    if found and min(found) < 0:
        raise MessageError(f"{where}={min(found)}: must be from 0 to {MAX_COUNT}")
    return found


def _little_endian(numbers: "array[int]") -> "array[int]":
    assert numbers.itemsize == _ID_BYTES
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _bytes(value: object, where: str) -> bytes:
    if not isinstance(value, bytes):
        raise MessageError(f"{where}: must be bytes, is {type(value).__name__}")
    return value
