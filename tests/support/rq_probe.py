"""Touches every place where rq unpickles, imports or calls, and prints which left a trace.

Usage: ``python rq_probe.py stock|hardened|one-lock URL``, with ``PLANTED_MARKER`` and a PYTHONPATH
that finds mixfleet and the planted module. ``one-lock`` leaves the second of two locks out.
"""

import json
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import rq
import rq.serializers
import rq.utils
from redis import Redis
from rq import Queue
from rq.job import Job

from support.planted import CALLBACK, plant, planted_pickle

MARKER = Path(os.environ["PLANTED_MARKER"])


def _job(redis: Redis, field: str) -> str:
    """Make a job in which one field is planted."""
    job_id = f"with-{field}"
    plain = pickle.dumps(("print", None, (), {}))
    redis.hset(f"rq:job:{job_id}", mapping={"status": "queued", "origin": "tiny", "data": plain})
    plant(redis, job_id, field, MARKER)
    return job_id


def touches(redis: Redis) -> dict[str, Callable[[], Any]]:
    def fetched(field: str) -> Job:
        return Job.fetch(_job(redis, field), connection=redis)

    def made(field: str) -> Job:
        return Job(_job(redis, field), connection=redis)

    return {
        "meta of a fetched job": lambda: fetched("meta"),
        "result of a fetched job": lambda: fetched("result"),
        "meta": lambda: made("meta").get_meta(),
        "result": lambda: made("result").result,
        "return value": lambda: made("return_value").return_value(),
        "results": lambda: made("return_value").results(),
        "arguments": lambda: fetched("data").args,
        "call": lambda: fetched("data").get_call_string(),
        "success callback": lambda: fetched("success_callback_name").success_callback,
        "failure callback": lambda: fetched("failure_callback_name").failure_callback,
        "stopped callback": lambda: fetched("stopped_callback_name").stopped_callback,
        "job of a queue": lambda: Queue("tiny", connection=redis).fetch_job(_job(redis, "meta")),
        "serializer": lambda: rq.serializers.resolve_serializer().loads(planted_pickle(MARKER)),
        "serializer called pickle": lambda: rq.serializers.resolve_serializer("pickle").loads(
            planted_pickle(MARKER)
        ),
        "serializer by its name": lambda: rq.serializers.resolve_serializer(CALLBACK),
        "job class of a queue": lambda: Queue("tiny", connection=redis, job_class=CALLBACK),
        "anything by its name": lambda: rq.utils.import_attribute(CALLBACK),
        "anything pickled": lambda: pickle.loads(planted_pickle(MARKER)),
    }


def names_a_class(redis: Redis) -> bool:
    """Whether a callback may be one of rq's own classes, which do no harm by themselves."""
    job: Any = Job("named", connection=redis)
    job._failure_callback_name = "rq.Worker"
    with suppress(ImportError):
        return bool(job.failure_callback is rq.Worker)
    return False


def main(mode: str, url: str) -> None:
    if mode == "one-lock":
        sys.addaudithook = lambda hook: None  # noqa: ARG005 - the name is part of its type
    if mode != "stock":
        from mixfleet_broker.rq_hardening import harden

        harden()
    fired = []
    with Redis.from_url(url) as redis:
        for name, touch in touches(redis).items():
            with suppress(Exception):
                touch()
            if MARKER.exists():
                fired.append(name)
                MARKER.rmdir()
            sys.modules.pop("left_behind", None)
        seen = {"touched": list(touches(redis)), "fired": fired, "named": names_a_class(redis)}
        sys.stdout.write(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
