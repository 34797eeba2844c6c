"""Ends of jobs that a call of the queue brought about, and the one log line of each.

A worker logs the ends that it writes itself, with their times; all others are logged by whoever's
call ended them: a cancel, a lost lease, a deadline.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedJob:
    """A job that a script ended."""

    job_id: str
    state: str
    code: str
    """Of the failure; empty for a cancelled job."""
    message: str

    @classmethod
    def from_reply(cls, reply: Sequence[Any]) -> Self:
        """Return what a script says of one end."""
        job_id, state, code, message = (part.decode(errors="replace") for part in reply)
        return cls(job_id=job_id, state=state, code=code, message=message)


def read_ends(replies: Iterable[Sequence[Any]], *, model: str) -> list[EndedJob]:
    """Return the ends that a script tells of, after logging one line for each."""
    ends = [EndedJob.from_reply(reply) for reply in replies]
    for end in ends:
        logger.info(
            "job ended job_id=%s state=%s reason=%s model=%s",
            end.job_id,
            end.state,
            f"{end.code}: {end.message}" if end.code else end.message or "-",
            model,
        )
    return ends
