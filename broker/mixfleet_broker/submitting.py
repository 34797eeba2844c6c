"""The arguments and the reply of the script that puts a job into the queue."""

import math
from hashlib import sha256
from typing import Any, Final

from mixfleet_broker.errors import (
    DeadlineUnreachableError,
    JobConflictError,
    QueueFullError,
    TenantQueueFullError,
)
from mixfleet_broker.job_codec import (
    encode_job,
)
from mixfleet_broker.lua import Argument, milliseconds
from mixfleet_broker.messages import (
    ChatJob,
)
from mixfleet_broker.rq_compat import DESCRIPTION, REFUSING_CALL
from mixfleet_broker.terms import READER_S, JobTerms, QueueRules

BYTES_PER_TOKEN: Final = 4
"""Of a prompt of tokens, whose text is not known here; the script's own guess."""

_UNITS: Final = {b"jobs": "jobs", b"tokens": "tokens"}
_TENANT_UNITS: Final = {b"tenant_jobs": "jobs", b"tenant_tokens": "tokens"}


def submit_args(job: ChatJob, terms: JobTerms, rules: QueueRules) -> tuple[Argument, ...]:
    """Return ARGV of ``submit.lua`` from the second on.

    Raises:
        MessageError: The job or its terms cannot be sent.
    """
    terms.check()
    payload = encode_job(job)
    return (
        job.job_id,
        payload,
        sha256(payload).hexdigest(),
        rules.queue_limit,
        rules.queue_token_limit,
        terms.tenant,
        rules.queue_limit if rules.tenant_queue_limit is None else rules.tenant_queue_limit,
        rules.queue_token_limit if rules.tenant_token_limit is None else rules.tenant_token_limit,
        terms.job_class,
        num_prompt_bytes(job),
        job.sampling.max_tokens or 0,
        _ms(terms.start_within_s),
        _ms(terms.finish_within_s),
        round(READER_S * 1000) if terms.ends_with_reader else 0,
        REFUSING_CALL,
        DESCRIPTION,
        rules.result_ttl,
        rules.failure_ttl,
        rules.ageing_ms,
        0 if terms.keep_s is None else math.ceil(terms.keep_s),
    )


def submit_outcome(reply: list[Any], job: ChatJob, terms: JobTerms) -> int:
    """Return how many jobs are before this one, from the script's reply.

    Raises:
        QueueFullError: The queue, or the tenant's share of it, is at its limit.
        JobConflictError: The id is taken by a job with another content.
        DeadlineUnreachableError: The job would start too late.
    """
    outcome, number, *more = reply
    if outcome == b"conflict":
        raise JobConflictError(job_id=job.job_id)
    if outcome == b"late":
        raise DeadlineUnreachableError(eta_s=number / 1000, within_s=more[0] / 1000)
    if outcome == b"full":
        depth, limit, retry_after_ms = more
        if number in _TENANT_UNITS:
            raise TenantQueueFullError(
                model=job.model,
                tenant=terms.tenant,
                unit=_TENANT_UNITS[number],
                depth=depth,
                limit=limit,
                retry_after_s=retry_after_ms / 1000,
            )
        raise QueueFullError(
            model=job.model,
            unit=_UNITS[number],
            depth=depth,
            limit=limit,
            retry_after_s=retry_after_ms / 1000,
        )
    return int(number)


def num_prompt_bytes(job: ChatJob) -> int:
    """Return the bytes of a job's prompt; of token ids, those of as much text."""
    texts = [job.prompt or "", *(message.content for message in job.messages)]
    num_text_bytes = sum(len(text.encode()) for text in texts)
    return num_text_bytes + BYTES_PER_TOKEN * len(job.prompt_token_ids)


def _ms(seconds: float | None) -> int:
    return 0 if seconds is None else milliseconds(seconds)
