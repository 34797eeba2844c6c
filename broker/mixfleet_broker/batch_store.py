"""Batches in Redis: one record each, driven by one gateway at a time under a lease.

Whatever a driver writes, it writes under its token. A gateway that was killed, or only slow, and
whose lease was taken over can write nothing any more; see docs/adr/0019.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

from redis import Redis

from mixfleet_broker.errors import BrokerError
from mixfleet_broker.file_store import MAX_FILES, FilesFull, new_file_id
from mixfleet_broker.keys import BATCH, BATCH_DONE, BATCHES_OPEN, OWN_BATCHES
from mixfleet_broker.lua import Argument, Scripts, milliseconds
from mixfleet_broker.redis_errors import redis_errors

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "cancelling",
    "cancelled",
    "failed",
    "expired",
]
STATUSES: Final[tuple[Status, ...]] = get_args(Status)
ENDS: Final = frozenset({"completed", "cancelled", "failed", "expired"})
MAX_BATCHES: Final = 1000
"""Of one tenant, ended ones as long as they are kept."""
MAX_OPEN: Final = 64
"""Batches that a gateway looks at when it has room for another."""
_ID: Final = re.compile(r"batch_[0-9a-f]{32}")
_COUNTS: Final = ("total", "completed", "failed", "prompt_tokens", "completion_tokens", "in_flight")
_TEXTS: Final = ("tenant", "key_id", "endpoint", "window", "input_file", "output_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """What a batch is opened with."""

    batch_id: str
    tenant: str
    """Whose it is."""
    key_id: str
    """Of the API key that pays; empty on a gateway that asks for none."""
    endpoint: str
    """The path that its lines are requests to."""
    input_file: str
    window: str
    """As the client wrote it."""
    window_s: float
    ttl_s: float
    """How long it is kept after its end."""
    in_flight: int
    """Most lines that wait or run at the same time. No driver may use another number: who takes
    the batch over finds by it which lines may have been submitted."""
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as it is now."""

    batch_id: str
    tenant: str
    key_id: str
    endpoint: str
    window: str
    input_file: str
    output_file: str
    error_file: str
    status: Status
    in_flight: int
    total: int
    """Lines, once they are checked."""
    completed: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    metadata: dict[str, str]
    errors: list[dict[str, Any]]
    """Why it failed, as OpenAI's batch errors."""
    times: dict[str, int]
    """Unix time of ``created``, ``expires`` and each status that it had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one line."""

    place: int
    """Of the line in its file, from 0."""
    is_error: bool
    line: bytes
    """With its end."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BatchLease:
    """A batch that its driver holds."""

    status: Status
    left_s: float
    """Until its window is over."""


class BatchStore:
    """All batches on one server. Safe to share between threads.

    Every call may be repeated after a lost reply.

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

    def open(self, batch: NewBatch) -> FilesFull | Literal["opened", "no_file"]:
        """Open a batch, or find it open already; or say why it cannot be opened."""
        fields = {
            "key_id": batch.key_id,
            "endpoint": batch.endpoint,
            "window": batch.window,
            "in_flight": str(batch.in_flight),
            "metadata": json.dumps(dict(batch.metadata)),
        }
        args: list[Argument] = [batch.tenant, batch.input_file, new_file_id(), new_file_id()]
        args += [milliseconds(batch.window_s), milliseconds(batch.ttl_s), MAX_FILES, MAX_BATCHES]
        args += [part for pair in fields.items() for part in pair]
        with redis_errors():
            reply = self._scripts.run("batch_open", batch.batch_id, *args)
        what = reply[0].decode()
        if what in ("files", "batches"):
            limit = MAX_FILES if what == "files" else MAX_BATCHES
            return FilesFull(unit=what, held=reply[1], limit=limit)
        return cast("Literal['opened', 'no_file']", what)

    def find(self, batch_id: str) -> Batch | None:
        """Return a batch; None where there is none, or no more."""
        return self._find([batch_id])[0] if is_batch_id(batch_id) else None

    def own(self, tenant: str) -> list[Batch]:
        """Return a tenant's batches, the latest first."""
        name = OWN_BATCHES(tenant, prefix=self._prefix)
        with redis_errors():
            ids: Any = self._redis.zrevrange(name, 0, MAX_BATCHES)
        return [batch for batch in self._find([i.decode() for i in ids]) if batch is not None]

    def open_ids(self) -> list[str]:
        """Return batches that have not ended, those first that nobody drives."""
        with redis_errors():
            ids: Any = self._redis.zrange(BATCHES_OPEN(prefix=self._prefix), 0, MAX_OPEN - 1)
        return [batch_id.decode() for batch_id in ids]

    def lease(self, batch_id: str, token: str, lease_s: float) -> BatchLease | None:
        """Take a batch, or keep it; None if it is another's, or has ended."""
        with redis_errors():
            reply = self._scripts.run("batch_lease", batch_id, token, milliseconds(lease_s))
        if not reply:
            return None
        return BatchLease(cast("Status", reply[0].decode()), reply[1] / 1000)

    def let_go(self, batch_id: str, token: str) -> None:
        """Leave a batch to whoever looks next."""
        with redis_errors():
            self._scripts.run("batch_lease", batch_id, token, 0)

    def append(self, batch_id: str, token: str, results: Sequence[Result]) -> bool:
        """Write results, each once; False if the batch is not the caller's any more."""
        flat: list[bytes | str | int] = []
        for result in results:
            what = "error" if result.is_error else "output"
            flat += [result.place, what, result.prompt_tokens, result.completion_tokens]
            flat.append(result.line)
        with redis_errors():
            return int(self._scripts.run("batch_append", batch_id, token, *flat)) >= 0

    def done(self, batch_id: str) -> bytes:
        """Return the marks of a batch's lines; see :func:`is_done`."""
        with redis_errors():
            found: Any = self._redis.get(BATCH_DONE(batch_id, prefix=self._prefix))
        return found or b""

    def move(
        self, batch_id: str, token: str, status: Status, fields: Mapping[str, str] | None = None
    ) -> Status | None:
        """Bring a batch into a status; return that which it has then.

        Args:
            batch_id: The batch.
            token: Of its driver; empty: its owner wants it cancelled.
            status: ``cancelling`` stays, unless it is to be ``cancelled`` or ``failed``.
            fields: ``total`` or ``errors`` (JSON), written in any case.

        Returns:
            None if there is no such batch, or it is not the caller's any more.
        """
        flat = [part for pair in (fields or {}).items() for part in pair]
        with redis_errors():
            reply = self._scripts.run("batch_move", batch_id, token, status, *flat)
        return None if reply is None else cast("Status", reply.decode())

    def _find(self, batch_ids: list[str]) -> list[Batch | None]:
        with redis_errors(), self._redis.pipeline(transaction=False) as pipeline:
            for batch_id in batch_ids:
                pipeline.hgetall(BATCH(batch_id, prefix=self._prefix))
            replies = pipeline.execute()
        return [_batch(i, content) for i, content in zip(batch_ids, replies, strict=True)]


def is_batch_id(text: str) -> bool:
    """Whether a text has the form of a batch's id."""
    return _ID.fullmatch(text) is not None


def is_done(marks: bytes, place: int) -> bool:
    """Whether a line has its result; Redis counts bits from the highest of a byte."""
    at, bit = divmod(place, 8)
    return at < len(marks) and bool(marks[at] & (0x80 >> bit))


def _batch(batch_id: str, content: dict[bytes, bytes]) -> Batch | None:
    if not content:
        return None
    try:
        fields = {name.decode(): value.decode() for name, value in content.items()}
        kinds = ("created", "expires", *STATUSES)
        plain: dict[str, Any] = {name: fields[name] for name in _TEXTS}
        plain |= {name: int(fields[name]) for name in _COUNTS}
        return Batch(
            batch_id=batch_id,
            error_file=fields["error_file"],
            status=cast("Status", fields["status"]),
            metadata=json.loads(fields["metadata"]),
            errors=json.loads(fields.get("errors", "[]")),
            times={k: int(fields[f"{k}_ms"]) // 1000 for k in kinds if f"{k}_ms" in fields},
            **plain,
        )
    except (KeyError, ValueError) as error:
        raise BrokerError(f"record of {batch_id} cannot be read: {error!r}") from error
