"""What operators tell workers from anywhere: pause, drain, go on.

An order is a key that lives as long as its worker. It holds at once: no claim of that worker gives
it anything while the key is there. A word on the worker's control list wakes it to read the order,
and each beat of its heart reads it anyway.
"""

from typing import Final, Literal, cast, get_args

from redis import Redis

from mixfleet_broker.errors import UnknownWorkerError
from mixfleet_broker.keys import (
    CONTROL,
    ORDER,
    WORKER,
)
from mixfleet_broker.names import (
    check_worker_id,
)
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.waiting import wait_for_one

Order = Literal["pause", "drain"]

READ_YOUR_ORDER: Final = "o"
_CANCEL: Final = "c:"
_WORD_TTL_S: Final = 60
_LIFE_S: Final = 86_400
"""Until the worker's next beat gives the order its own life."""


def give_order(redis: Redis, worker_id: str, order: Order, *, prefix: str = "") -> None:
    """Tell a worker to take no more jobs for now, or to finish what it has and end.

    Raises:
        UnknownWorkerError: No such worker lives.
    """
    _write(redis, worker_id, order, prefix)


def withdraw_order(redis: Redis, worker_id: str, *, prefix: str = "") -> None:
    """Let a paused worker go on; one that has begun to drain does not turn back.

    Raises:
        UnknownWorkerError: No such worker lives.
    """
    _write(redis, worker_id, None, prefix)


def _write(redis: Redis, worker_id: str, order: Order | None, prefix: str) -> None:
    key = ORDER(check_worker_id(worker_id), prefix=prefix)
    control = CONTROL(worker_id, prefix=prefix)
    with redis_errors():
        if not redis.exists(WORKER(worker_id, prefix=prefix)):
            raise UnknownWorkerError(worker_id=worker_id)
        with redis.pipeline(transaction=True) as pipeline:
            if order is None:
                pipeline.delete(key)
            else:
                pipeline.set(key, order, ex=_LIFE_S)
            pipeline.rpush(control, READ_YOUR_ORDER)
            pipeline.expire(control, _WORD_TTL_S)
            pipeline.execute()


def order_of(redis: Redis, worker_id: str, *, prefix: str = "") -> Order | None:
    """Return what a worker is told to do."""
    with redis_errors():
        return as_order(redis.get(ORDER(check_worker_id(worker_id), prefix=prefix)))


def wait_for_word(
    redis: Redis, worker_id: str, timeout_s: float, *, prefix: str = ""
) -> str | None:
    """Wait until somebody has a word for the worker; None when nobody has."""
    found = wait_for_one(redis, [CONTROL(worker_id, prefix=prefix)], timeout_s)
    return None if found is None else found[1].decode()


def as_order(reply: object) -> Order | None:
    """Return an order as Redis holds it; None for none, and for one of another version."""
    word = cast("bytes | None", reply)
    for known in get_args(Order):
        if word == known.encode():
            order: Order = known
            return order
    return None


def cancelled_run(word: str) -> tuple[str, str] | None:
    """Return job id and token of the run that a word takes away; None for another word."""
    if not word.startswith(_CANCEL):
        return None
    job_id, _, token = word.removeprefix(_CANCEL).rpartition(":")
    return job_id, token
