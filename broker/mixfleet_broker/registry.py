"""Who serves which model: what workers say of themselves, for us and for rq's tools.

A worker is alive while its record is there: each beat renews it for three leases. Looking
changes nothing.
"""

import logging
import os
import platform
import socket
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final, Literal, Self, cast

from redis import Redis

from mixfleet_broker import keys
from mixfleet_broker.lua import Scripts
from mixfleet_broker.names import check_model_name, check_worker_id
from mixfleet_broker.orders import Order, as_order
from mixfleet_broker.redis_errors import redis_errors

logger = logging.getLogger(__name__)

WorkerState = Literal["starting", "idle", "busy", "paused", "draining"]
TAKES_NONE: Final = frozenset({"starting", "paused", "draining"})
"""States in which a worker takes no jobs."""

LEASES_PER_LIFE: Final = 3
"""A worker that is silent for so many leases counts as gone."""
LATELY_S: Final = 7 * 86_400
"""How long a model that nobody serves any more is remembered."""

_RQ_TIME: Final = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """What a worker says of itself."""

    worker_id: str
    model: str
    state: WorkerState
    in_flight: int
    """Jobs that it generates now."""
    max_batch_size: int
    """Most jobs that it generates at the same time."""
    context_length: int
    """Most tokens of prompt and answer together."""
    host: str
    pid: int
    version: str
    """Of mixfleet."""
    python_version: str
    started_at: float
    """Unix time by the worker's own clock."""

    @classmethod
    def of_this_process(
        cls,
        *,
        worker_id: str,
        model: str,
        max_batch_size: int,
        context_length: int,
        started_at: float,
    ) -> Self:
        """Return the record of a worker that is starting in this process.

        Raises:
            MessageError: One of the names cannot be part of a key.
        """
        return cls(
            worker_id=check_worker_id(worker_id),
            model=check_model_name(model),
            state="starting",
            in_flight=0,
            max_batch_size=max_batch_size,
            context_length=context_length,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=version("mixfleet"),
            python_version=platform.python_version(),
            started_at=started_at,
        )


class Registration:
    """One worker's entry in the registry and in rq's.

    Args:
        redis: A client whose replies are bytes.
        record: The worker; its state and load are as they were last said.
        lease_s: The entry stays for three of them after a beat.
        prefix: Before all keys.

    Raises:
        BrokerError: From every method, see :mod:`mixfleet_broker.redis_errors`.
    """

    def __init__(
        self, redis: Redis, record: WorkerRecord, *, lease_s: float, prefix: str = ""
    ) -> None:
        self._redis = redis
        self._prefix = prefix
        self._scripts = Scripts(redis, prefix)
        self._life_ms = round(LEASES_PER_LIFE * lease_s * 1000)
        self.record = record

    def beat(self, *, state: WorkerState, in_flight: int) -> Order | None:
        """Say that the worker lives and how it is, all in one round trip.

        Returns:
            What an operator told it to do.
        """
        self.record = replace(self.record, state=state, in_flight=in_flight)
        ours = _flat(_our_fields(self.record))
        num_slots = 0 if state in TAKES_NONE else self.record.max_batch_size
        with redis_errors():
            reply = self._scripts.run(
                "beat",
                self.record.model,
                self.record.worker_id,
                self._life_ms,
                LATELY_S * 1000,
                _rq_time(self.record.started_at),
                num_slots,
                len(ours),
                *ours,
                *_flat(_rq_fields(self.record)),
            )
        return as_order(reply)

    def deregister(self) -> None:
        """Say that the worker is gone; its model is remembered for a while."""
        worker_id, model = self.record.worker_id, self.record.model
        rq_key = self._key(keys.RQ_WORKER, worker_id)
        with redis_errors(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.delete(
                self._key(keys.WORKER, worker_id),
                self._key(keys.ORDER, worker_id),
                self._key(keys.CONTROL, worker_id),
                rq_key,
            )
            pipeline.zrem(self._key(keys.WORKERS), worker_id)
            pipeline.hdel(self._key(keys.CAPACITY, model), worker_id)
            pipeline.srem(self._key(keys.RQ_WORKERS), rq_key)
            pipeline.srem(self._key(keys.RQ_QUEUE_WORKERS, model), rq_key)
            pipeline.execute()

    def _key(self, key: keys.Key, *names: str) -> str:
        return key(*names, prefix=self._prefix)


def workers(redis: Redis, *, prefix: str = "") -> list[WorkerRecord]:
    """Return the live workers, by model and name.

    A record that this version cannot read, of a worker of another version, is logged and left
    out.
    """
    with redis_errors():
        ids = _names(redis.zrange(keys.WORKERS(prefix=prefix), 0, -1))
        with redis.pipeline(transaction=False) as pipeline:
            for worker_id in ids:
                pipeline.hgetall(keys.WORKER(worker_id, prefix=prefix))
            contents = pipeline.execute()
    records = [
        record
        for worker_id, content in zip(ids, contents, strict=True)
        if content and (record := _read(worker_id, content)) is not None
    ]
    return sorted(records, key=lambda record: (record.model, record.worker_id))


def models(redis: Redis, *, prefix: str = "") -> list[str]:
    """Return the names of the models served now or in the last days, the latest first."""
    with redis_errors():
        return _names(redis.zrevrange(keys.MODELS(prefix=prefix), 0, -1))


def _names(reply: Any) -> list[str]:
    return [name.decode() for name in cast("list[bytes]", reply)]


def _our_fields(record: WorkerRecord) -> dict[str, str]:
    return {field.name: str(getattr(record, field.name)) for field in fields(record)}


def _rq_fields(record: WorkerRecord) -> dict[str, str]:
    return {
        # rq knows busy and idle; a worker that drains is one of them too.
        "state": "busy" if record.in_flight else "idle",
        "pid": str(record.pid),
        "hostname": record.host,
        "ip_address": "unknown",
        "version": record.version,
        "python_version": record.python_version,
    }


def _rq_time(unix_time: float) -> str:
    return datetime.fromtimestamp(unix_time, UTC).strftime(_RQ_TIME)


def _flat(content: dict[str, str]) -> list[str]:
    return [part for pair in content.items() for part in pair]


def _read(worker_id: str, content: dict[bytes, bytes]) -> WorkerRecord | None:
    values: dict[str, Any] = {}
    try:
        for field in fields(WorkerRecord):
            text = content[field.name.encode()].decode()
            values[field.name] = field.type(text) if field.type in (int, float) else text
    except (KeyError, ValueError) as error:
        logger.warning("worker_record_not_legible worker_id=%s error=%r", worker_id, error)
        return None
    return WorkerRecord(**values)
