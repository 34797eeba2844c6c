"""Counts and times of the jobs that a gateway serves, for Prometheus."""

from collections.abc import Iterator
from typing import Final

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import Metric

from mixfleet_broker.gateway import metric_names as names
from mixfleet_broker.gateway.metric_names import MetricSpec
from mixfleet_broker.gateway.watch import JobObserver, WatchedJob

_CREATED: Final = "_created"


class JobMetrics(JobObserver):
    """Observes jobs; a collector of its registry. Belongs to the event loop."""

    def __init__(self) -> None:
        self._jobs = _counter(names.JOBS)
        self._refused = _counter(names.REFUSED)
        self._redeliveries = _counter(names.REDELIVERIES)
        self._prompt_tokens = _counter(names.PROMPT_TOKENS)
        self._generation_tokens = _counter(names.GENERATION_TOKENS)
        self._ttft = _histogram(names.TTFT)
        self._itl = _histogram(names.ITL)
        self._e2e = _histogram(names.E2E)
        self._queue_time = _histogram(names.QUEUE_TIME)
        self._tpot = _histogram(names.TPOT)
        self._models: dict[str, _OfModel] = {}

    def started(self, job: WatchedJob) -> None:
        """Count a run."""
        metrics = self._of(job.model)
        if job.num_runs > 1:
            metrics.redeliveries.inc()
        elif job.started_at is not None:
            metrics.queue_time.observe(job.started_at - job.submitted_at)

    def tokens(self, job: WatchedJob, num_new: int, since_s: float | None) -> None:
        """Count tokens and time them."""
        metrics = self._of(job.model)
        metrics.generation_tokens.inc(num_new)
        if since_s is not None:
            for _ in range(num_new):
                metrics.itl.observe(since_s / num_new)
        elif job.first_token_at is not None:
            metrics.ttft.observe(job.first_token_at - job.submitted_at)

    def ended(self, job: WatchedJob) -> None:
        """Count an end, and time the whole if it is a good one."""
        assert job.end is not None
        assert job.ended_at is not None
        end, metrics = job.end, self._of(job.model)
        reason = end.finish_reason or end.code or end.state
        self._jobs.labels(job.model, end.state, reason).inc()
        prompt = end.usage.prompt_tokens if end.usage is not None else job.num_prompt_tokens
        metrics.prompt_tokens.inc(prompt or 0)
        if end.state != "finished":
            return
        metrics.e2e.observe(job.ended_at - job.submitted_at)
        if job.first_token_at is not None and job.last_token_at is not None and job.num_tokens > 1:
            spent = job.last_token_at - job.first_token_at
            metrics.tpot.observe(spent / (job.num_tokens - 1))

    def refused(self, model: str, code: str) -> None:
        """Count a job that was not taken."""
        self._refused.labels(model, code).inc()

    def collect(self) -> Iterator[Metric]:
        """Iterate over the metrics, without the times at which each began to be counted."""
        for family in self._families():
            for metric in family.collect():
                metric.samples = [s for s in metric.samples if not s.name.endswith(_CREATED)]
                yield metric

    def _families(self) -> tuple[Counter | Histogram, ...]:
        return (
            self._jobs,
            self._refused,
            self._redeliveries,
            self._prompt_tokens,
            self._generation_tokens,
            self._ttft,
            self._itl,
            self._e2e,
            self._queue_time,
            self._tpot,
        )

    def _of(self, model: str) -> "_OfModel":
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = _OfModel(self, model)
        return found


class _OfModel:
    """The children of one model: to look labels up for each token would cost more than to count."""

    def __init__(self, metrics: JobMetrics, model: str) -> None:
        self.redeliveries = metrics._redeliveries.labels(model)
        self.prompt_tokens = metrics._prompt_tokens.labels(model)
        self.generation_tokens = metrics._generation_tokens.labels(model)
        self.ttft = metrics._ttft.labels(model)
        self.itl = metrics._itl.labels(model)
        self.e2e = metrics._e2e.labels(model)
        self.queue_time = metrics._queue_time.labels(model)
        self.tpot = metrics._tpot.labels(model)


def _counter(spec: MetricSpec) -> Counter:
    return Counter(spec.name, spec.help, spec.labels, registry=None)


def _histogram(spec: MetricSpec) -> Histogram:
    return Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=None)
