"""The wire: what a client sends, what comes back, and its bytes (msgpack, schema 1).

Everything that is read from Redis passes through here and is checked against the schema:
wrong types, unknown fields, too large or too deep are a :class:`MessageError`. Nothing is
unpickled, imported or evaluated. The bytes of a job are made here, those of its events in
event_codec.py, both with packing.py, which alone imports msgpack.
"""

import secrets
import time
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from mixfleet_broker.errors import MessageError
from mixfleet_broker.names import (
    check_job_id,
    check_model_name,
)
from mixfleet_broker.packing import MAX_MESSAGE_BYTES as MAX_MESSAGE_BYTES
from mixfleet_broker.packing import pack, unpack
from mixfleet_broker.schema import Fields, text
from mixfleet_broker.stock_job import chat_of_stock_job

SCHEMA_VERSION: Final = 1
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARACTERS: Final = 256
MAX_COUNT: Final = 2**31 - 1
"""Of anything that is counted in tokens."""
MAX_SEED: Final = 2**63 - 1

Role = Literal["system", "user", "assistant"]
JobState = Literal["queued", "started", "finished", "failed", "canceled"]
"""rq's own status names."""
TERMINAL_STATES: frozenset[JobState] = frozenset({"finished", "failed", "canceled"})
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How the answer is to be generated. None is the model's own default."""

    temperature: float | None = None
    """0 is greedy; at most 2."""
    top_k: int | None = None
    """0 keeps all tokens."""
    top_p: float | None = None
    """In (0, 1]."""
    max_tokens: int | None = None
    """Longest answer; None lets it run to the end of the model's context."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these; none of it is ever shown."""
    seed: int | None = None
    """0 to 2**63 - 1; None derives one from the job id, so that a continued job goes on alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatJob:
    """A chat to be answered. Exactly one of ``messages`` and ``prompt`` is given."""

    job_id: str
    """Made by the client, see :func:`new_job_id`; whoever knows it may read the answer."""
    model: str
    """Name of the model, which is the name of its queue."""
    messages: tuple[ChatMessage, ...] = ()
    prompt: str | None = None
    """Plain text to be continued, without any chat format."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Counts of one answer, in tokens."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A worker took the job. Another one later means that the first was lost."""

    run: int
    worker_id: str
    num_tokens: int
    """Tokens delivered by earlier runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """The next piece of an answer, one or more tokens long."""

    num_tokens: int
    """Tokens of the answer up to and including this chunk: 1, 2, 3, ... so that a reader can
    see that it lost nothing."""
    text: str
    """Whole characters; empty while a character or a possible stop string is incomplete."""
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """The last event of a job; there is exactly one."""

    state: Literal["finished", "failed", "canceled"]
    finish_reason: FinishReason | None = None
    """Set when finished."""
    code: str | None = None
    """Set when failed: the stable name of the error, see errors.py."""
    message: str | None = None
    usage: Usage | None = None


RequeueReason = Literal["lost", "released", "isolated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeued:
    """The job waits again, and its next run goes on with the answer."""

    num_tokens: int
    """Tokens delivered so far."""
    reason: RequeueReason
    """Its worker died; gave it back; or its engine failed on a batch that it was part of."""


JobEvent = RunStarted | TokenChunk | Requeued | JobEnd


def new_job_id() -> str:
    """Return a new job id: 32 hex digits, 48 bits of time in ms and 80 random bits.

    Ids sort by time, and nobody can guess one.
    """
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def validate(job: ChatJob) -> None:
    """Check every field of ``job``, as the worker that gets it will.

    Raises:
        MessageError: The job cannot be sent; the text names the field and its value.
    """
    _read_job(_job_map(job))


def encode_job(job: ChatJob) -> bytes:
    """Return the bytes of a job; equal jobs give equal bytes.

    Raises:
        MessageError: As :func:`validate`, or the job is larger than ``MAX_MESSAGE_BYTES``.
    """
    validate(job)
    return pack(_job_map(job))


def encode_stock_job(job_id: str, model: str, data: bytes) -> bytes:
    """Return the bytes of a job that an rq producer enqueued; only :func:`decode_job` looks in.

    Args:
        job_id: rq's id of the job.
        model: The queue that it was in.
        data: The ``data`` field of rq's job, as it is.
    """
    return pack({"v": SCHEMA_VERSION, "kind": "rq", "id": job_id, "model": model, "data": data})


def decode_job(data: bytes) -> ChatJob:
    """Return the job in ``data``.

    Raises:
        MessageError: It is not of the schema.
    """
    value = unpack(data)
    if isinstance(value, dict) and value.get("kind") == "rq":
        value = chat_of_stock_job(value)
    return _read_job(value)


def _job_map(job: ChatJob) -> dict[str, object]:
    settings = job.sampling
    sampling: dict[str, object] = {
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "stop": list(settings.stop),
        "seed": settings.seed,
    }
    value: dict[str, object] = {
        "v": SCHEMA_VERSION,
        "kind": "chat",
        "id": job.job_id,
        "model": job.model,
    }
    if job.messages:
        value["messages"] = [{"role": m.role, "content": m.content} for m in job.messages]
    if job.prompt is not None:
        value["prompt"] = job.prompt
    value["sampling"] = {name: given for name, given in sampling.items() if given is not None}
    return value


def _read_job(value: object) -> ChatJob:
    fields = Fields(value, "job")
    version, kind = fields.take("v"), fields.take("kind")
    if version != SCHEMA_VERSION or kind != "chat":
        raise MessageError(
            f"job: schema {str(version)[:20]!r} of kind {str(kind)[:20]!r} is not known here, "
            f"only {SCHEMA_VERSION!r} of 'chat'"
        )
    sampling = fields.take("sampling")
    job = ChatJob(
        job_id=check_job_id(fields.text("id")),
        model=check_model_name(fields.text("model")),
        messages=tuple(
            _read_message(message, f"messages[{i}]")
            for i, message in enumerate(fields.items("messages"))
        ),
        prompt=fields.text_or_none("prompt"),
        sampling=_read_sampling(Fields({} if sampling is None else sampling, "sampling")),
    )
    fields.done()
    if bool(job.messages) == (job.prompt is not None):
        raise MessageError("job: exactly one of messages and prompt must be given")
    return job


def _read_message(value: object, where: str) -> ChatMessage:
    fields = Fields(value, where)
    role = fields.text("role")
    content = fields.text("content")
    fields.done()
    for known in get_args(Role):
        if role == known:
            return ChatMessage(role=known, content=content)
    raise MessageError(f"{where}.role={role[:20]!r}: must be one of {', '.join(get_args(Role))}")


def _read_sampling(fields: Fields) -> SamplingSettings:
    stop = tuple(text(item, f"stop[{i}]") for i, item in enumerate(fields.items("stop")))
    if len(stop) > MAX_STOP_STRINGS:
        raise MessageError(f"stop: {len(stop)} strings, the limit is {MAX_STOP_STRINGS}")
    for i, item in enumerate(stop):
        if not 1 <= len(item) <= MAX_STOP_CHARACTERS:
            raise MessageError(
                f"stop[{i}]: {len(item)} characters, must be from 1 to {MAX_STOP_CHARACTERS}"
            )
    top_p = fields.number_or_none("top_p", 0.0, 1.0)
    if top_p == 0.0:
        raise MessageError("sampling.top_p=0: must be greater than 0")
    settings = SamplingSettings(
        temperature=fields.number_or_none("temperature", 0.0, 2.0),
        top_k=fields.integer_or_none("top_k", 0, MAX_COUNT),
        top_p=top_p,
        max_tokens=fields.integer_or_none("max_tokens", 1, MAX_COUNT),
        stop=stop,
        seed=fields.integer_or_none("seed", 0, MAX_SEED),
    )
    fields.done()
    return settings
