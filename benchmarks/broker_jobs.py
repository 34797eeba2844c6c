"""The jobs of the broker's benchmark, and the quick ways to queue many and to end them."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Final

from redis import Redis

from mixfleet_broker.flush import Flush
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    JobEnd,
    SamplingSettings,
    TokenChunk,
    Usage,
    new_job_id,
)
from mixfleet_broker.queue import ClaimedJob, JobQueue
from mixfleet_broker.records import Lease
from mixfleet_broker.submitting import submit_args
from mixfleet_broker.terms import JobTerms, QueueRules

MODEL: Final = "bench"
WORKER: Final = "bench-worker"
CLAIM: Final = 16
"""Jobs of one claim: what a worker of 16 slots takes at most."""
PROMPT_BYTES: Final = 1200
ANSWER_TOKENS: Final = 200
PIPELINED: Final = 100

_SENTENCE: Final = "Tell a long story of a queue, of those who wait in it and of those who serve. "
_PROMPT: Final = (_SENTENCE * (PROMPT_BYTES // len(_SENTENCE) + 1))[:PROMPT_BYTES]
LEASE_S: Final = 600.0
"""Nobody renews while something is measured."""


def bench_queue(redis: Redis, *, result_ttl_s: float = 900.0, lease_s: float = LEASE_S) -> JobQueue:
    """Return the queue, with room for a million jobs."""
    rules = QueueRules(
        queue_limit=1_000_000,
        queue_token_limit=1_000_000_000,
        lease_s=lease_s,
        result_ttl_s=result_ttl_s,
    )
    return JobQueue(redis, MODEL, rules)


def chat_job(max_tokens: int | None = ANSWER_TOKENS) -> ChatJob:
    """Return a new job with a prompt of 1.2 KB."""
    return ChatJob(
        job_id=new_job_id(),
        model=MODEL,
        messages=(ChatMessage(role="user", content=_PROMPT),),
        sampling=SamplingSettings(max_tokens=max_tokens, temperature=0.7, top_p=0.9),
    )


def fill(queue: JobQueue, tenants: Iterable[str]) -> list[str]:
    """Queue one job for each of ``tenants``, in order, and return their ids.

    It is the script that :meth:`JobQueue.submit` runs, many in one round trip.
    """
    waiting = iter(tenants)
    job_ids = []
    for tenant in itertools.islice(waiting, 1):  # by itself, so that the server has the script
        job_ids.append(_submit(queue, chat_job(), tenant))
    while batch := list(itertools.islice(waiting, PIPELINED)):
        jobs = [chat_job() for _ in batch]
        with queue.redis.pipeline(transaction=False) as pipeline:
            for job, tenant in zip(jobs, batch, strict=True):
                args = submit_args(job, JobTerms(tenant=tenant), queue.rules)
                queue.scripts.queue_on(pipeline, "submit", MODEL, *args)
            pipeline.execute()
        job_ids += [job.job_id for job in jobs]
    return job_ids


def _submit(queue: JobQueue, job: ChatJob, tenant: str) -> str:
    queue.submit(job, JobTerms(tenant=tenant))
    return job.job_id


def finish_all(queue: JobQueue, claimed: Sequence[ClaimedJob]) -> None:
    """End the jobs without an answer, in one round trip, as a worker's step does."""
    if not claimed:
        return
    flush = Flush(queue, WORKER)
    for job in claimed:
        flush.finish(job.lease, DONE)
    flush.send()


def leases_of(queue: JobQueue, num_jobs: int) -> list[Lease]:
    """Queue so many jobs, claim them all, and return their leases."""
    fill(queue, itertools.repeat("default", num_jobs))
    leases: list[Lease] = []
    while len(leases) < num_jobs:
        claimed = queue.claim(WORKER, num_jobs - len(leases), new_job_id())
        leases += [job.lease for job in claimed]
    return leases


def chunk(num_tokens: int, text: str = " word") -> TokenChunk:
    """Return the chunk of token number ``num_tokens``."""
    return TokenChunk(num_tokens=num_tokens, text=text, token_ids=(1000 + num_tokens % 30_000,))


DONE: Final = JobEnd(
    state="finished",
    finish_reason="stop",
    usage=Usage(prompt_tokens=PROMPT_BYTES // 4, completion_tokens=ANSWER_TOKENS),
)
