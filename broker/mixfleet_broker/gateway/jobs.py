"""``/v1/jobs``: where a job stands, and its end on demand, whatever dialect it came by."""

from dataclasses import asdict
from typing import Any, Final

from fastapi import APIRouter, Request

from mixfleet_broker.channel import ended
from mixfleet_broker.errors import UnknownJobError
from mixfleet_broker.gateway.api_errors import error_of_end
from mixfleet_broker.gateway.service import Service
from mixfleet_broker.jobs import JobRow
from mixfleet_broker.messages import JobEnd
from mixfleet_broker.queue import CancelOutcome

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_REASON: Final = "cancelled by DELETE /v1/jobs"


@router.get("/{job_id}")
async def get_job(request: Request, job_id: str) -> dict[str, Any]:
    """Say where a job stands; other keys' jobs are as unknown as those that never were."""
    service, row = await _own_job(request, job_id)
    info = await service.fleet.info(job_id, row.model)
    end = await service.fleet.with_redis(ended, job_id)
    return {
        "id": job_id,
        "object": "job",
        "model": row.model,
        "state": info.state,
        "outlook": info.outlook,
        "priority": row.priority,
        "position": info.position,
        "tokens_ahead": info.tokens_ahead,
        "eta_s": info.eta_s,
        "waited_s": info.waited_s,
        "attempt": info.attempt,
        "worker": info.worker_id,
        **_ending(job_id, end),
    }


@router.delete("/{job_id}")
async def cancel_job(request: Request, job_id: str) -> dict[str, Any]:
    """End a job wherever it is; doing it again, or too late, changes nothing."""
    service, row = await _own_job(request, job_id)
    outcome = await service.fleet.cancel(job_id, row.model, _REASON)
    if outcome is CancelOutcome.UNKNOWN:
        raise UnknownJobError(job_id=job_id)
    return {"id": job_id, "object": "job", "outcome": outcome.value}


async def _own_job(request: Request, job_id: str) -> tuple[Service, JobRow]:
    """Return the job if the caller may know of it; raises as if it did not exist otherwise."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    row = await service.fleet.find(job_id)
    caller.check_owner(row.tenant, job_id)
    return service, row


def _ending(job_id: str, end: JobEnd | None) -> dict[str, Any]:
    """Return what is known of a job's end; all None while it goes on."""
    if end is None:
        return {"finish_reason": None, "usage": None, "error": None}
    failure = error_of_end(end, job_id)
    error = None if failure is None else {"code": failure.code, "message": failure.message}
    usage = asdict(end.usage) if end.usage is not None else None
    return {"finish_reason": end.finish_reason, "usage": usage, "error": error}
