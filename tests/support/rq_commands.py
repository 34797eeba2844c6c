"""What a user of stock rq does, for a process with whichever rq its interpreter has.

Usage: ``python rq_commands.py URL COMMAND [ARGUMENT...]``; prints its result as JSON. Nothing of
mixfleet is imported here: the interpreter may not have it.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry, clean_registries
from rq.serializers import JSONSerializer
from rq.version import VERSION


def version(_redis: Redis) -> str:
    return str(VERSION)


def enqueue(redis: Redis, queue: str, chat: str) -> str:
    jobs = Queue(queue, connection=redis, serializer=JSONSerializer)
    return str(jobs.enqueue("mixfleet.chat", json.loads(chat)).id)


def enqueue_pickled(redis: Redis, queue: str) -> str:
    return str(Queue(queue, connection=redis).enqueue("os.system", "true").id)


def status(redis: Redis, job_id: str) -> str:
    return str(Job.fetch(job_id, connection=redis).get_status().value)


def describe(redis: Redis, job_id: str) -> dict[str, Any]:
    job = Job.fetch(job_id, connection=redis)
    return {
        "call": [job.func_name, list(job.args), job.kwargs],
        "description": job.description,
        "origin": job.origin,
        "worker": job.worker_name,
        "created": job.created_at.isoformat(),
    }


def return_value(redis: Redis, job_id: str) -> Any:
    return Job.fetch(job_id, connection=redis, serializer=JSONSerializer).return_value()


def failure(redis: Redis, job_id: str) -> str | None:
    result = Job.fetch(job_id, connection=redis).latest_result()
    return None if result is None else result.exc_string


def cancel(redis: Redis, job_id: str) -> None:
    Job.fetch(job_id, connection=redis).cancel()


def delete(redis: Redis, job_id: str) -> None:
    Job.fetch(job_id, connection=redis).delete()


def requeue(redis: Redis, queue: str, job_id: str) -> None:
    FailedJobRegistry(queue, connection=redis).requeue(job_id)


def clean(redis: Redis, queue: str) -> int:
    clean_registries(Queue(queue, connection=redis))
    return StartedJobRegistry(queue, connection=redis).count


def clean_for_ever(redis: Redis, queue: str) -> None:
    """A janitor that never rests."""
    while True:
        clean_registries(Queue(queue, connection=redis))


def empty(redis: Redis, queue: str) -> int:
    jobs: Any = Queue(queue, connection=redis)
    return int(jobs.empty())


COMMANDS: dict[str, Callable[..., Any]] = {
    command.__name__: command
    for command in (
        *(version, enqueue, enqueue_pickled, status, describe, return_value, failure),
        *(cancel, delete, requeue, clean, clean_for_ever, empty),
    )
}


def main(url: str, command: str, *arguments: str) -> None:
    with Redis.from_url(url) as redis:
        sys.stdout.write(json.dumps(COMMANDS[command](redis, *arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
