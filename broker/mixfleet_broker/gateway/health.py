"""Whether the gateway lives, whether anything can be answered, and what it is."""

from importlib.metadata import version

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mixfleet_broker.errors import BrokerError
from mixfleet_broker.gateway.service import Service
from mixfleet_broker.registry import TAKES_NONE

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Say that this process answers."""
    return {"status": "ok"}


@router.get("/readyz")
@router.get("/health")
async def readyz(request: Request) -> Response:
    """Say whether a worker is ready: 200, or 503 with the reason."""
    service: Service = request.app.state.service
    try:
        workers = await service.fleet.workers()
    except BrokerError as error:
        return _not_ready(str(error), 0)
    num_ready = sum(worker.state not in TAKES_NONE for worker in workers)
    if num_ready:
        return JSONResponse({"status": "ok", "ready_workers": num_ready})
    if workers:
        states = ", ".join(sorted({worker.state for worker in workers}))
        return _not_ready(f"no worker takes jobs: all are {states}", len(workers))
    return _not_ready("no worker lives: start one with `mixfleet worker`", 0)


@router.get("/version")
async def version_of_mixfleet() -> dict[str, str]:
    """Return the version of mixfleet."""
    return {"version": version("mixfleet")}


def _not_ready(reason: str, num_workers: int) -> Response:
    return JSONResponse(
        {"status": "unavailable", "reason": reason, "workers": num_workers}, status_code=503
    )
