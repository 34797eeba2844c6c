"""Small questions that any worker of a model answers at once, beside its generating.

Who asks puts the question on the model's list and waits on a list of its own for the answer. A
worker that dies in between costs the asker its patience; asking again changes nothing, as no
question has an effect.
"""

import re
import secrets
import time
from dataclasses import dataclass
from typing import Final

from redis import Redis

from mixfleet_broker.connection import MAX_BLOCK_S
from mixfleet_broker.errors import (
    InquiriesFullError,
    InquiryTimeoutError,
    MessageError,
    NoWorkerError,
)
from mixfleet_broker.inquiry_codec import (
    Inquiry,
    InquiryAnswer,
    decode_answer,
    encode_inquiry,
)
from mixfleet_broker.keys import INQUIRIES, INQUIRY_ANSWER
from mixfleet_broker.lua import Scripts
from mixfleet_broker.names import check_model_name
from mixfleet_broker.redis_errors import redis_errors
from mixfleet_broker.waiting import wait_for_one

MAX_WAITING: Final = 64
"""Inquiries of one model that wait, 1 MiB each at most."""
TIMEOUT_S: Final = 10.0
"""How long an answer is waited for, unless the caller says otherwise."""
MAX_TIMEOUT_S: Final = 30.0
_LIFE_MS: Final = round(1000 * MAX_TIMEOUT_S)
"""Of a list that nobody pops, and of an answer that nobody fetches."""
_HEAD: Final = re.compile(rb"([0-9]{13})([0-9a-f]{32})")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedInquiry:
    """A question as a worker finds it."""

    inquiry_id: str
    body: bytes
    """What :func:`~mixfleet_broker.inquiry_codec.decode_inquiry` reads; not yet checked."""
    left_s: float
    """Until nobody waits for the answer any more."""


def ask(
    redis: Redis,
    model: str,
    inquiry: Inquiry,
    timeout_s: float = TIMEOUT_S,
    *,
    prefix: str = "",
) -> InquiryAnswer:
    """Return what a worker of ``model`` answers.

    Args:
        redis: A client whose replies are bytes.
        model: Whose workers are asked.
        inquiry: The question.
        timeout_s: Longest wait, at most ``MAX_TIMEOUT_S``.
        prefix: Before all keys.

    Raises:
        JobError: The worker refuses, as it would refuse such a job.
        MessageError: The question cannot be asked.
        NoWorkerError: No worker of the model lives.
        InquiriesFullError: Too many inquiries wait.
        InquiryTimeoutError: No answer came in time; ask again.
        BrokerError: See :mod:`mixfleet_broker.redis_errors`.
    """
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise MessageError(
            f"timeout_s={timeout_s:g}: must be above 0 and at most {MAX_TIMEOUT_S:g}"
        )
    deadline = time.monotonic() + timeout_s
    inquiry_id = secrets.token_hex(16)
    _put(redis, check_model_name(model), inquiry_id, encode_inquiry(inquiry), timeout_s, prefix)
    key = INQUIRY_ANSWER(inquiry_id, prefix=prefix)
    while (left_s := deadline - time.monotonic()) > 0:
        found = wait_for_one(redis, [key], min(left_s, MAX_BLOCK_S))
        if found is not None:
            return decode_answer(found[1])
    raise InquiryTimeoutError(model=model, limit_s=timeout_s)


def _put(
    redis: Redis, model: str, inquiry_id: str, body: bytes, timeout_s: float, prefix: str
) -> None:
    with redis_errors():
        # At least a millisecond, as Redis counts.
        within_ms = max(1, round(1000 * timeout_s))
        reply = Scripts(redis, prefix).run(
            "ask", model, inquiry_id, body, within_ms, MAX_WAITING, _LIFE_MS
        )
    outcome, waiting = reply
    if outcome == b"no_worker":
        raise NoWorkerError(model=model)
    if outcome == b"full":
        raise InquiriesFullError(model=model, waiting=waiting, limit=MAX_WAITING)


class InquiryBox:
    """Where the workers of a model find questions. Safe to share between threads.

    Args:
        redis: A client whose replies are bytes.
        model: The workers' own.
        prefix: Before all keys.

    Raises:
        BrokerError: From every method, see :mod:`mixfleet_broker.redis_errors`.
    """

    def __init__(self, redis: Redis, model: str, *, prefix: str = "") -> None:
        self._redis = redis
        self._prefix = prefix
        self._key = INQUIRIES(check_model_name(model), prefix=prefix)

    def wait(self, timeout_s: float) -> AskedInquiry | None:
        """Return the next question; None when none came in time.

        One that nobody waits for any more is dropped, and is then no question.

        Raises:
            MessageError: What was there is no inquiry; it is gone, and nobody gets an answer.
        """
        found = wait_for_one(self._redis, [self._key], timeout_s)
        if found is None:
            return None
        head = _HEAD.match(found[1])
        if head is None:
            raise MessageError(f"inquiry: {len(found[1])} bytes without deadline and id")
        with redis_errors():
            seconds, microseconds = self._redis.time()
        left_s = int(head[1]) / 1000 - seconds - microseconds / 1e6
        if left_s <= 0:
            return None
        body = found[1][head.end() :]
        return AskedInquiry(inquiry_id=head[2].decode(), body=body, left_s=left_s)

    def give(self, inquiry_id: str, answer: bytes) -> None:
        """Send the bytes of an answer to whoever asked."""
        key = INQUIRY_ANSWER(inquiry_id, prefix=self._prefix)
        with redis_errors(), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.rpush(key, answer)
            pipeline.pexpire(key, _LIFE_MS)
            pipeline.execute()
