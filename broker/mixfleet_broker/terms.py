"""The terms under which jobs wait and run: those of a queue, and those of one job."""

import math
from dataclasses import dataclass
from typing import Final, Literal, Self, cast, get_args

from mixfleet_broker.errors import MessageError
from mixfleet_broker.names import (
    check_tenant,
)
from mixfleet_broker.settings import Settings

Priority = Literal["interactive", "default", "batch"]
PRIORITIES: Final[tuple[Priority, ...]] = get_args(Priority)
"""First goes first; a class is its number here."""
Durability = Literal["server", "fsync", "replica"]
"""Who must have a job before a submit returns: the server, its disk, or one of its replicas."""

DEFAULT_TENANT: Final = "default"
MAX_WITHIN_S: Final = 30 * 86_400
MAX_KEEP_S: Final = 3650 * 86_400
READER_S: Final = 30.0
"""A reader that is silent for so long is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRules:
    """How one queue is run.

    Limits and times go with each call: who submits says how full the queue may be for it, who
    works says how long it holds a lease.
    """

    queue_limit: int = 10_000
    """Jobs that may wait."""
    queue_token_limit: int = 50_000_000
    """Tokens of prompts and answers that may wait, as far as they can be foreseen."""
    tenant_queue_limit: int | None = None
    """Jobs of one tenant that may wait; None: the queue's own limit."""
    tenant_token_limit: int | None = None
    """Tokens of one tenant that may wait; None: the queue's own limit."""
    ageing_s: float = 120.0
    """A job that has waited for so long moves up a class of priority."""
    lease_s: float = 15.0
    """How long a claim or a renewal holds."""
    max_losses: int = 3
    """A job whose workers died so often has failed; its last run is alone on its worker."""
    result_ttl_s: float = 900.0
    """How long a finished job and any answer are kept."""
    failure_ttl_s: float = 86_400.0
    """How long a failed job is kept for its operator."""
    durability: Durability = "server"
    durability_s: float = 1.0
    """How long a submit waits for a disk or a replica."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return the rules that the settings in force make."""
        return cls(
            queue_limit=settings.queue_limit,
            queue_token_limit=settings.queue_token_limit,
            tenant_queue_limit=settings.tenant_queue_limit,
            tenant_token_limit=settings.tenant_token_limit,
            ageing_s=settings.ageing_s,
            lease_s=settings.lease_s,
            max_losses=settings.max_losses,
            result_ttl_s=settings.result_ttl_s,
            durability=cast("Durability", settings.durability),  # the table allows no other
        )

    @property
    def lease_ms(self) -> int:
        """The lease in Redis's unit."""
        return round(self.lease_s * 1000)

    @property
    def ageing_ms(self) -> int:
        """The ageing time in Redis's unit."""
        return round(self.ageing_s * 1000)

    @property
    def result_ttl(self) -> int:
        """Whole seconds; at least one."""
        return max(1, round(self.result_ttl_s))

    @property
    def failure_ttl(self) -> int:
        """Whole seconds; at least one."""
        return max(1, round(self.failure_ttl_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTerms:
    """What a client asks for one job beside its answer."""

    tenant: str = DEFAULT_TENANT
    """Whose job it is: shares and limits are counted by it."""
    priority: Priority = "default"
    start_within_s: float | None = None
    """Refuse or end the job if no worker has taken it by then; None: it may wait."""
    finish_within_s: float | None = None
    """End the job if its answer is not complete by then; None: it may take its time."""
    ends_with_reader: bool = False
    """Cancel the job once its reader has been silent for ``READER_S``, see attendance.py."""

    keep_s: float | None = None
    """Keep its end so long at least, and a stored response of its id from then on; None: it has
    none."""

    def check(self) -> None:
        """Check every field.

        Raises:
            MessageError: One cannot be used; the text names it.
        """
        check_tenant(self.tenant)
        if self.priority not in PRIORITIES:
            known = ", ".join(PRIORITIES)
            raise MessageError(f"priority={str(self.priority)[:20]!r}: must be one of {known}")
        for name in ("start_within_s", "finish_within_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 < value <= MAX_WITHIN_S):
                raise MessageError(f"{name}={value}: must be above 0 and at most {MAX_WITHIN_S}")
        if self.keep_s is not None and not 0 < self.keep_s <= MAX_KEEP_S:
            raise MessageError(f"keep_s={self.keep_s}: must be above 0 and at most {MAX_KEEP_S}")

    @property
    def job_class(self) -> int:
        """The priority as the queue counts it; lower goes first."""
        return PRIORITIES.index(self.priority)
