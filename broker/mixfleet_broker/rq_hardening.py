"""rq with its teeth drawn: in a hardened process it shows what is in Redis and runs none of it.

rq unpickles what it finds in a job's hash, imports the names that it finds there, and moves jobs
while it counts them. A process that has called :func:`harden` does none of that. A value that
would have run something is shown as unreadable, and hurts only its own job.
"""

import pickle
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar

import rq.defaults
import rq.job
import rq.queue
import rq.registry
import rq.results
import rq.serializers
import rq.utils
import rq.worker.base
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq.version import VERSION

from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.plain_pickle import REFUSAL, BoundedZlib, plain_loads

T = TypeVar("T")

UNREADABLE: Final = "(unreadable: not plain data of a bounded size, so it was not loaded)"
"""Shown in the place of a value that was refused."""


def harden() -> None:
    """Harden this process, once and for good, before it reads anything from Redis.

    Raises:
        MixfleetError: The installed rq is not one that this module fits; nothing may be started.
    """
    sys.addaudithook(_refuse_every_class)
    try:
        _replace(rq.serializers.DefaultSerializer, "loads", staticmethod(plain_loads))
        _replace(rq.job, "zlib", BoundedZlib)
        _replace(rq.results, "zlib", BoundedZlib)
        _refuse_imports()
        _show_what_is_unreadable()
        _move_nothing()
    except AttributeError as error:
        raise MixfleetError(
            f"mixfleet cannot make rq {VERSION} safe ({error}); install one that it knows: "
            "pip install 'rq==3.0.*'"
        ) from error


def _refuse_every_class(event: str, args: tuple[Any, ...]) -> None:  # noqa: ARG001
    # The second lock: whatever else in this process unpickles, in this rq or a later one.
    if event == "pickle.find_class":
        raise pickle.UnpicklingError(REFUSAL)


def _replace(owner: object, name: str, value: object) -> None:
    getattr(owner, name)  # what is not there is not replaced, but missed
    setattr(owner, name, value)


def _refuse_imports() -> None:
    """Let a name from Redis import nothing, and a name from the command line rq's own classes."""
    real = rq.utils.import_attribute
    own = {
        value
        for name, value in vars(rq.defaults).items()
        if name.startswith("DEFAULT_") and name.endswith("_CLASS")
    }

    def import_own_class(name: str) -> Callable[..., Any]:
        if name not in own:
            raise ImportError(f"{name[:80]!r}: here only rq's own classes are loaded")
        return real(name)

    def import_nothing(name: str) -> NoReturn:  # noqa: ARG001
        raise ImportError("what a job names is not imported here")

    _replace(rq.utils, "import_attribute", import_own_class)
    for name, module in list(sys.modules.items()):
        is_of_rq = name.partition(".")[0] == "rq"
        if is_of_rq and getattr(module, "import_attribute", None) is real:
            _replace(module, "import_attribute", import_own_class)
    _replace(rq.job, "import_attribute", import_nothing)


def _readable(read: Callable[[], T], otherwise: Callable[[], T]) -> T:
    """Return ``read()``, or ``otherwise()`` where what lies in Redis cannot be read."""
    try:
        return read()
    except (RedisConnectionError, RedisTimeoutError):
        raise
    except Exception:  # bytes of a stranger: see plain_loads
        return otherwise()


def _show_what_is_unreadable() -> None:
    """Let one spoilt job be one spoilt row, where rq would fail the whole page."""
    job_class, result_class = rq.job.Job, rq.results.Result
    real_get_meta, real_restore = job_class.get_meta, result_class.restore
    real_fetch, real_current = rq.queue.Queue.fetch_job, rq.worker.base.BaseWorker.get_current_job
    real_to_dict = job_class.to_dict

    def get_meta(job: Any, refresh: bool = True) -> Any:
        return _readable(lambda: real_get_meta(job, refresh), lambda: {"meta": UNREADABLE})

    def to_dict(job: Any, *args: Any, **options: Any) -> dict[str, Any]:
        # What could not be read is not written over: a job's own worker can read it.
        fields = real_to_dict(job, *args, **options)
        if "unserialized" in job.meta:
            fields.pop("meta", None)
        return fields

    def restore(
        job_id: str, result_id: str, payload: Any, connection: Redis, serializer: Any = None
    ) -> Any:
        return _readable(
            lambda: real_restore(job_id, result_id, payload, connection, serializer),
            lambda: _unreadable_result(job_id, result_id, connection),
        )

    def fetch_job(queue: Any, job_id: str) -> Any:
        return _readable(
            lambda: real_fetch(queue, job_id),
            lambda: _unreadable_job(job_id, queue.connection, queue.name),
        )

    def get_current_job(worker: Any) -> Any:
        # None also for a job that was deleted while it ran.
        return _readable(lambda: real_current(worker), lambda: None)

    _replace(job_class, "_deserialize_data", _deserialize_data)
    _replace(job_class, "get_meta", get_meta)
    _replace(job_class, "to_dict", to_dict)
    _replace(result_class, "restore", staticmethod(restore))
    _replace(rq.queue.Queue, "fetch_job", fetch_job)
    _replace(rq.worker.base.BaseWorker, "get_current_job", get_current_job)


def _deserialize_data(job: Any) -> None:
    call = _readable(lambda: job.serializer.loads(job.data), lambda: None)
    match call:
        case str(), _, list() | tuple(), dict():
            pass
        case _:
            call = UNREADABLE, None, (), {}
    job._func_name, job._instance, job._args, job._kwargs = call


def _unreadable_job(job_id: str, connection: Redis, origin: str) -> object:
    job: Any = rq.job.Job(job_id, connection=connection)
    job.origin, job.description, job.created_at = origin, UNREADABLE, None
    return job


def _unreadable_result(job_id: str, result_id: str, connection: Redis) -> rq.results.Result:
    return rq.results.Result(
        job_id,
        rq.results.Result.Type.SUCCESSFUL,  # the only type whose value is shown
        connection=connection,
        id=result_id,
        return_value=UNREADABLE,
        exc_string=UNREADABLE,
    )


def _move_nothing() -> None:
    """Take the transitions out of the clean-ups that rq runs while it counts.

    They go by this machine's clock, call and retry what they find, and enqueue a job twice when
    two of them look at once. Expired entries of ended jobs are still trimmed.
    """

    def cleanup(registry: Any, *args: Any, **options: Any) -> list[Any]:  # noqa: ARG001
        return []

    _replace(rq.registry.StartedJobRegistry, "cleanup", cleanup)
    rate_limit = sys.modules.get("rq.rate_limit")
    for module, name in ((rq.registry, "ReadyJobRegistry"), (rate_limit, "RateLimitRegistry")):
        if hasattr(module, name):  # since rq 3
            _replace(getattr(module, name), "cleanup", cleanup)
