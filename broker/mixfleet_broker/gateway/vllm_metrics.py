"""The same numbers under vLLM's names, so that dashboards and scalers made for it work here."""

from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from mixfleet_broker.gateway.metric_names import JOBS, METRICS

ENGINE: Final = "0"
"""vLLM numbers the engines behind one server; a fleet behind its queue is one."""
_OF_CANCELED: Final = "abort"
_NAMES: Final = {
    spec.name.removesuffix("_total"): spec.vllm_name.removesuffix("_total")
    for spec in METRICS
    if spec.vllm_name is not None
}


class Collector(Protocol):
    """Whatever gives metrics."""

    def collect(self) -> Iterator[Metric]:
        """Iterate over them."""
        ...


class VllmAliases:
    """A collector that repeats what others give.

    Args:
        sources: The others.
    """

    def __init__(self, sources: Sequence[Collector]) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        """Iterate over the metrics that vLLM has too."""
        for source in self._sources:
            for metric in source.collect():
                alias = _NAMES.get(metric.name)
                if alias is not None:
                    yield _renamed(metric, alias)


def _renamed(metric: Metric, alias: str) -> Metric:
    renamed = Metric(alias, metric.documentation, metric.type)
    is_jobs = metric.name == JOBS.name.removesuffix("_total")
    for sample in metric.samples:
        labels = _success(sample) if is_jobs else _other(sample)
        if labels is not None:
            name = alias + sample.name.removeprefix(metric.name)
            renamed.samples.append(Sample(name, labels, sample.value))
    return renamed


def _other(sample: Sample) -> dict[str, str]:
    rest = {name: value for name, value in sample.labels.items() if name != "model"}
    return {"model_name": sample.labels["model"], "engine": ENGINE, **rest}


def _success(sample: Sample) -> dict[str, str] | None:
    """Return vLLM's labels of an end; None for a failure, which it does not count here."""
    state = sample.labels["state"]
    if state == "failed":
        return None
    reason = sample.labels["reason"] if state == "finished" else _OF_CANCELED
    return {"model_name": sample.labels["model"], "engine": ENGINE, "finished_reason": reason}
