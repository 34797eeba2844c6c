"""OpenAI's ``/v1/models``: what is served now or was in the last days."""

from typing import Any

from fastapi import APIRouter, Request

from mixfleet_broker.gateway.service import Service
from mixfleet_broker.registry import WorkerRecord

router = APIRouter(prefix="/v1", tags=["openai"])


@router.get("/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List the models, the latest served first."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    workers = await service.fleet.workers()
    names = [
        name
        for name in await service.fleet.models()
        if caller.record is None or caller.record.may_use_model(name)
    ]
    return {"object": "list", "data": [_card(name, workers) for name in names]}


@router.get("/models/{model}")
async def get_model(request: Request, model: str) -> dict[str, Any]:
    """Return one model; 404 names those that there are."""
    service: Service = request.app.state.service
    caller = await service.gate.caller(request)
    caller.check_model(model)
    await service.fleet.check_model(model)
    return _card(model, await service.fleet.workers())


def _card(name: str, workers: list[WorkerRecord]) -> dict[str, Any]:
    own = [worker for worker in workers if worker.model == name]
    return {
        "id": name,
        "object": "model",
        "created": int(min((worker.started_at for worker in own), default=0)),
        "owned_by": "mixfleet",
        "num_workers": len(own),
        "max_model_len": min((worker.context_length for worker in own), default=None),
    }
