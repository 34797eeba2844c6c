"""What became of something that a worker wrote: a piece of an answer, or a job's end."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from mixfleet_broker.errors import BrokerError

_DONE: Final = -1
_LOST: Final = -2


class WriteOutcome(StrEnum):
    """What became of one write."""

    DONE = "done"
    """It is in Redis, also when an earlier call had brought it there."""
    LOST = "lost"
    """The job is not the worker's any more."""


@dataclass(frozen=True, slots=True)
class Behind:
    """The channel lacks tokens that come before the write, so nothing was written.

    Redis has come back without the last of what it had confirmed: after a crash, or as a replica
    that took the primary's place. What it lacks is to be sent again, as it was.
    """

    num_tokens: int
    """Tokens of the answer that the channel has."""


def write_outcome(reply: object) -> WriteOutcome | Behind:
    """Return what a reply of ``append.lua`` (one of its list) or ``finish.lua`` says.

    Raises:
        BrokerError: It is none of theirs.
    """
    if not isinstance(reply, int) or reply < _LOST:
        raise BrokerError(f"write: unexpected reply {reply!r:.200}")
    if reply == _DONE:
        return WriteOutcome.DONE
    return WriteOutcome.LOST if reply == _LOST else Behind(reply)
