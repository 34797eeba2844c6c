"""Jobs, leases and the passing of time for tests of the queue."""

from typing import Any

from redis import Redis

from mixfleet_broker.flush import Flush
from mixfleet_broker.keys import CHANNEL, LEASES
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    JobEnd,
    SamplingSettings,
    TokenChunk,
    Usage,
    new_job_id,
)
from mixfleet_broker.queue import ClaimedJob, JobQueue, Lease
from mixfleet_broker.write_outcome import Behind, WriteOutcome

MODEL = "tiny"
DONE = JobEnd(
    state="finished",
    finish_reason="stop",
    usage=Usage(prompt_tokens=3, completion_tokens=2),
)


def chat_job(
    question: str = "Hi", *, job_id: str | None = None, model: str = MODEL, **sampling: Any
) -> ChatJob:
    """Return a chat of one question."""
    return ChatJob(
        job_id=job_id or new_job_id(),
        model=model,
        messages=(ChatMessage(role="user", content=question),),
        sampling=SamplingSettings(**sampling),
    )


def chunk(num_tokens: int, *token_ids: int, text: str | None = None) -> TokenChunk:
    """Return a chunk; its text is its token ids unless it is given."""
    shown = "".join(f"{i} " for i in token_ids) if text is None else text
    return TokenChunk(num_tokens=num_tokens, text=shown, token_ids=token_ids)


def submit_and_claim(queue: JobQueue, worker_id: str = "w1") -> ClaimedJob:
    """Queue one job and claim it."""
    job = chat_job(model=queue.model)
    queue.submit(job)
    return claim_one(queue, worker_id)


def claim_one(queue: JobQueue, worker_id: str = "w1") -> ClaimedJob:
    """Claim the one job that there must be."""
    [claimed] = queue.claim(worker_id, 1, new_job_id())
    return claimed


def append_chunk(queue: JobQueue, lease: Lease, chunk: TokenChunk) -> WriteOutcome | Behind:
    """Append one piece of an answer."""
    flush = Flush(queue)
    flush.append(lease, chunk)
    [outcome] = flush.send().outcomes
    return outcome


def end_all_leases(redis: Redis, model: str = MODEL) -> None:
    """Let the time of all leases be over, without waiting for it."""
    for member in texts(redis.zrange(LEASES(model), 0, -1)):
        redis.zadd(LEASES(model), {member: 1})


def event_ids(redis: Redis, job_id: str) -> list[str]:
    """Return the ids on a job's channel."""
    entries: Any = redis.xrange(CHANNEL(job_id))
    return texts(event_id for event_id, _ in entries)


def texts(replies: Any) -> list[str]:
    """Return what Redis answered with bytes as text."""
    return [reply.decode() for reply in replies]
