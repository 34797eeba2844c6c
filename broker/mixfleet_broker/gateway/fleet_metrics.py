"""How the fleet and this gateway stand, for Prometheus: read anew at each scrape."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily

from mixfleet_broker.gateway import metric_names as names
from mixfleet_broker.gateway.metric_names import MetricSpec
from mixfleet_broker.overview import ModelStatus
from mixfleet_broker.registry import WorkerRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One look at everything."""

    statuses: Sequence[ModelStatus] = ()
    workers: Sequence[WorkerRecord] = ()
    redis_up: bool = True
    num_jobs: int = 0
    num_waiting: int = 0
    num_channels: int = 0
    num_readers: int = 0


class FleetGauges:
    """A collector that says what :attr:`standing` holds."""

    def __init__(self) -> None:
        self.standing = Standing()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Iterate over the gauges; those of models are left out while Redis is away."""
        now = self.standing
        yield _plain(names.REDIS_UP, now.redis_up)
        if now.redis_up:
            yield from _of_models(now.statuses)
            yield from _of_workers(now.workers)
        yield _plain(names.GATEWAY_JOBS, now.num_jobs)
        yield _plain(names.GATEWAY_WAITING, now.num_waiting)
        yield _plain(names.GATEWAY_CHANNELS, now.num_channels)
        yield _plain(names.GATEWAY_READERS, now.num_readers)


def _of_models(statuses: Sequence[ModelStatus]) -> Iterator[GaugeMetricFamily]:
    values: dict[MetricSpec, dict[str, float]] = {
        names.QUEUE_DEPTH: {s.model: s.num_queued for s in statuses},
        names.QUEUE_TOKENS: {s.model: s.queued_tokens for s in statuses},
        names.QUEUE_OLDEST: {s.model: s.oldest_queued_s or 0.0 for s in statuses},
        names.JOBS_RUNNING: {s.model: s.num_started for s in statuses},
        names.JOBS_SUSPECT: {s.model: s.num_suspects for s in statuses},
        names.WORKER_SLOTS: {s.model: s.num_slots for s in statuses},
    }
    for spec, by_model in values.items():
        family = _family(spec)
        for model, value in by_model.items():
            family.add_metric([model], value)
        yield family


def _of_workers(workers: Sequence[WorkerRecord]) -> Iterator[GaugeMetricFamily]:
    states = _family(names.WORKERS)
    in_flight: Counter[str] = Counter()
    slots: Counter[str] = Counter()
    for (model, state), number in Counter((w.model, w.state) for w in workers).items():
        states.add_metric([model, state], number)
    for worker in workers:
        in_flight[worker.model] += worker.in_flight
        slots[worker.model] += worker.max_batch_size
    fill = _family(names.BATCH_FILL)
    for model, number in slots.items():
        fill.add_metric([model], in_flight[model] / number if number else 0.0)
    yield states
    yield fill


def _family(spec: MetricSpec) -> GaugeMetricFamily:
    return GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)


def _plain(spec: MetricSpec, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(spec.name, spec.help, value=value)
