"""Every metric of a gateway: its name, kind, labels and meaning; docs/metrics.md shows them."""

from dataclasses import dataclass
from typing import Final, Literal

MetricKind = Literal["gauge", "counter", "histogram"]

# The limits are those of vLLM's histograms of the same suffix (vllm/v1/metrics/loggers.py, later
# buckets.py), so that its dashboards and alerts mean the same here.
TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
LATENCY_BUCKETS: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One metric as it is exposed."""

    name: str
    """With ``_total`` if it is a counter."""
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram, in seconds."""
    vllm_name: str | None = None
    """Under which ``vllm_metric_aliases`` gives the same numbers, if vLLM has such a thing."""


def _gauge(name: str, text: str, *labels: str, vllm: str | None = None) -> MetricSpec:
    return MetricSpec(
        name=f"mixfleet_{name}", kind="gauge", help=text, labels=labels, vllm_name=vllm
    )


def _counter(name: str, text: str, *labels: str, vllm: str | None = None) -> MetricSpec:
    return MetricSpec(
        name=f"mixfleet_{name}", kind="counter", help=text, labels=labels, vllm_name=vllm
    )


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> MetricSpec:
    return MetricSpec(
        name=f"mixfleet_{name}",
        kind="histogram",
        help=text,
        labels=("model",),
        buckets=buckets,
        vllm_name=f"vllm:{name}",
    )


REDIS_UP: Final = _gauge("redis_up", "1 if Redis answered at this scrape, else 0.")
QUEUE_DEPTH: Final = _gauge(
    "queue_depth", "Jobs that wait.", "model", vllm="vllm:num_requests_waiting"
)
QUEUE_TOKENS: Final = _gauge(
    "queue_tokens", "Tokens expected of the jobs that wait, prompts and answers.", "model"
)
QUEUE_OLDEST: Final = _gauge(
    "queue_oldest_age_seconds", "How long the next job has waited; 0 if none waits.", "model"
)
JOBS_RUNNING: Final = _gauge(
    "jobs_running", "Jobs that workers hold.", "model", vllm="vllm:num_requests_running"
)
JOBS_SUSPECT: Final = _gauge(
    "jobs_suspect", "Waiting jobs that may have killed workers and are to be run alone.", "model"
)
WORKERS: Final = _gauge("workers", "Live workers.", "model", "state")
WORKER_SLOTS: Final = _gauge(
    "worker_slots", "Jobs that the workers which take jobs run at once.", "model"
)
BATCH_FILL: Final = _gauge(
    "batch_fill_ratio", "Jobs in the live workers' batches, by what these hold at most.", "model"
)
GATEWAY_JOBS: Final = _gauge("gateway_jobs_open", "Jobs whose answers this gateway gives now.")
GATEWAY_WAITING: Final = _gauge("gateway_jobs_waiting", "Those of them that have not started.")
GATEWAY_CHANNELS: Final = _gauge("gateway_channels", "Channels that this gateway reads now.")
GATEWAY_READERS: Final = _gauge(
    "gateway_reader_threads", "Threads that read them, each with a connection to Redis."
)

FLEET_GAUGES: Final = (
    REDIS_UP, QUEUE_DEPTH, QUEUE_TOKENS, QUEUE_OLDEST, JOBS_RUNNING, JOBS_SUSPECT, WORKERS,
    WORKER_SLOTS, BATCH_FILL, GATEWAY_JOBS, GATEWAY_WAITING, GATEWAY_CHANNELS, GATEWAY_READERS,
)  # fmt: skip

JOBS: Final = _counter(
    "jobs_total",
    "Jobs that ended here; the reason is the finish reason or the error's code.",
    "model",
    "state",
    "reason",
    vllm="vllm:request_success_total",
)
REFUSED: Final = _counter(
    "jobs_refused_total",
    "Jobs that queue or key limits kept out, by their codes.",
    "model",
    "code",
)
REDELIVERIES: Final = _counter(
    "redeliveries_total",
    "Runs of jobs after their first: a worker died or gave them back.",
    "model",
)
PROMPT_TOKENS: Final = _counter(
    "prompt_tokens_total", "Prompt tokens of ended jobs.", "model", vllm="vllm:prompt_tokens_total"
)
GENERATION_TOKENS: Final = _counter(
    "generation_tokens_total",
    "Tokens of answers, as they came.",
    "model",
    vllm="vllm:generation_tokens_total",
)
TTFT: Final = _histogram(
    "time_to_first_token_seconds", "From submit to the first token.", TTFT_BUCKETS
)
ITL: Final = _histogram(
    "inter_token_latency_seconds",
    "Between tokens; those that came together share their time.",
    TOKEN_BUCKETS,
)
E2E: Final = _histogram(
    "e2e_request_latency_seconds", "From submit to the end, of finished jobs.", LATENCY_BUCKETS
)
QUEUE_TIME: Final = _histogram(
    "request_queue_time_seconds", "From submit to the first run.", LATENCY_BUCKETS
)
TPOT: Final = _histogram(
    "request_time_per_output_token_seconds",
    "Of finished jobs: from the first token to the last, by the tokens after the first.",
    TOKEN_BUCKETS,
)

JOB_METRICS: Final = (
    JOBS, REFUSED, REDELIVERIES, PROMPT_TOKENS, GENERATION_TOKENS, TTFT, ITL, E2E, QUEUE_TIME, TPOT,
)  # fmt: skip

METRICS: Final = (*FLEET_GAUGES, *JOB_METRICS)


def metrics_markdown() -> str:
    """Return the table of all metrics."""
    lines = ["| metric | kind | labels | meaning | as vLLM's |", "|---|---|---|---|---|"]
    for spec in METRICS:
        labels = ", ".join(f"`{label}`" for label in spec.labels)
        alias = f"`{spec.vllm_name}`" if spec.vllm_name else ""
        lines.append(f"| `{spec.name}` | {spec.kind} | {labels} | {spec.help} | {alias} |")
    return "\n".join(lines) + "\n"
