"""Where a job stands, from the reply of the script that looks."""

from typing import Any, get_args

from mixfleet_broker.errors import MessageError
from mixfleet_broker.messages import (
    TERMINAL_STATES,
    JobState,
)
from mixfleet_broker.records import JobInfo, Outlook
from mixfleet_broker.terms import DEFAULT_TENANT


def read_standing(job_id: str, reply: list[Any]) -> JobInfo:
    """Return what ``standing.lua`` says of a job.

    Raises:
        MessageError: rq's tools brought it into a state that is none of ours.
    """
    status, worker_id, attempt, losses, waited_ms, rank, tokens, eta_ms = reply[:8]
    num_workers, num_alive, num_slots, suspended, alone, tenant = reply[8:]
    state = _job_state(job_id, status.decode())
    waits = state == "queued"
    return JobInfo(
        job_id=job_id,
        state=state,
        position=_known(rank) if waits else None,
        worker_id=worker_id.decode() if worker_id else None,
        attempt=attempt,
        num_losses=losses,
        tokens_ahead=_known(tokens) if waits else None,
        eta_s=eta_ms / 1000 if waits and eta_ms >= 0 else None,
        waited_s=waited_ms / 1000 if waited_ms >= 0 else None,
        num_workers=num_workers,
        num_slots=num_slots,
        tenant=tenant.decode() or DEFAULT_TENANT,
        outlook=_outlook(state, num_workers, num_alive, suspended=suspended, alone=alone),
    )


def _outlook(
    state: JobState, num_workers: int, num_alive: int, *, suspended: int, alone: int
) -> Outlook:
    if state in TERMINAL_STATES:
        return "ended"
    if state == "started":
        return "started"
    if num_alive == 0:
        return "no_worker"
    if suspended or num_workers == 0:
        return "paused"
    return "suspect" if alone else "queued"


def _known(number: int) -> int | None:
    return number if number >= 0 else None


def _job_state(job_id: str, status: str) -> JobState:
    for known in get_args(JobState):
        if status == known:
            state: JobState = known
            return state
    raise MessageError(f"job {job_id} has the status {status[:40]!r}, which mixfleet does not use")
