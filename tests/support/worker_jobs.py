"""Claimed chat jobs for tests of the worker."""

from typing import Any

from mixfleet_broker.job_codec import (
    encode_job,
)
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    OutputFormat,
    Role,
    SamplingSettings,
)
from mixfleet_broker.queue import ClaimedJob, Lease
from mixfleet_worker.handoff import TakenJob

MODEL = "tiny"


def a_lease(job_id: str = "job1", run: int = 1) -> Lease:
    """Return a lease; its token is its run's."""
    return Lease(job_id=job_id, token=f"t{run}", run=run)


def a_payload(
    job_id: str = "job1",
    *,
    model: str = MODEL,
    question: str = "Hi",
    role: Role = "user",
    prompt: str | None = None,
    prompt_token_ids: tuple[int, ...] = (),
    output_format: OutputFormat | None = None,
    **sampling: Any,
) -> bytes:
    """Return the bytes of a chat of one question, or of a plain prompt; greedy by default."""
    is_chat = prompt is None and not prompt_token_ids
    return encode_job(
        ChatJob(
            job_id=job_id,
            model=model,
            messages=(ChatMessage(role=role, content=question),) if is_chat else (),
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            output_format=output_format,
            sampling=SamplingSettings(**{"temperature": 0.0, **sampling}),
        )
    )


def a_taken_job(
    payload: bytes | None = None,
    *,
    lease: Lease | None = None,
    delivered: tuple[int, ...] = (),
    num_delivered: int | None = None,
) -> TakenJob:
    """Return a job as the I/O thread hands it over."""
    lease = lease or a_lease()
    claimed = ClaimedJob(
        lease=lease,
        payload=a_payload(lease.job_id) if payload is None else payload,
        num_delivered=len(delivered) if num_delivered is None else num_delivered,
        attempt=1,
        num_losses=0,
    )
    return TakenJob(claimed=claimed, delivered_token_ids=delivered, claimed_at=0.0)
