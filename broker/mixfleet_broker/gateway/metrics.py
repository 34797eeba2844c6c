"""``GET /metrics``: the queue, the workers and this gateway's jobs, as Prometheus reads them."""

import logging

from fastapi import APIRouter, Request
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from starlette.responses import Response

from mixfleet_broker.errors import BrokerError
from mixfleet_broker.gateway.fleet import Fleet
from mixfleet_broker.gateway.fleet_metrics import FleetGauges, Standing
from mixfleet_broker.gateway.job_metrics import JobMetrics
from mixfleet_broker.gateway.service import Service
from mixfleet_broker.gateway.vllm_metrics import VllmAliases
from mixfleet_broker.gateway.watch import JobWatch

logger = logging.getLogger(__name__)

router = APIRouter(tags=["health"])


class Metrics:
    """What one gateway exposes, in a registry of its own.

    Args:
        vllm_aliases: Repeat under vLLM's names what it has too.
    """

    def __init__(self, *, vllm_aliases: bool) -> None:
        self.jobs = JobMetrics()
        self._fleet = FleetGauges()
        self._registry = CollectorRegistry()
        self._registry.register(self._fleet)
        self._registry.register(self.jobs)
        if vllm_aliases:
            self._registry.register(VllmAliases([self._fleet, self.jobs]))
        ProcessCollector(registry=self._registry)

    async def text(self, fleet: Fleet, watch: JobWatch) -> bytes:
        """Return the page; what needs Redis is left out while it is away."""
        self._fleet.standing = await _look(fleet, watch)
        return generate_latest(self._registry)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return all metrics; where keys are asked for, one with the scope ``ops``."""
    service: Service = request.app.state.service
    await service.gate.caller(request, "ops")
    shown: Metrics = request.app.state.metrics
    page = await shown.text(service.fleet, service.watch)
    return Response(page, headers={"content-type": CONTENT_TYPE_LATEST})


async def _look(fleet: Fleet, watch: JobWatch) -> Standing:
    try:
        statuses, workers, redis_up = await fleet.statuses(), await fleet.workers(), True
    except BrokerError as error:
        logger.warning("fleet_not_read error=%s", error)
        statuses, workers, redis_up = [], [], False
    return Standing(
        statuses=statuses,
        workers=workers,
        redis_up=redis_up,
        num_jobs=watch.num_jobs,
        num_waiting=watch.num_waiting(),
        num_channels=fleet.hub.num_channels,
        num_readers=fleet.hub.num_readers,
    )
