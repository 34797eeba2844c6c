"""What jobs leave in the metrics, by a clock of the test's own."""

from mixfleet_broker.errors import QueueFullError
from mixfleet_broker.gateway.job_metrics import JobMetrics
from mixfleet_broker.gateway.watch import JobWatch
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    Requeued,
    RunStarted,
    TokenChunk,
    Usage,
)

JOB = ChatJob(job_id="job1", model="tiny", prompt="x")
END = JobEnd(
    state="finished",
    finish_reason="length",
    usage=Usage(prompt_tokens=7, completion_tokens=4),
)


class Watched:
    """A watch with metrics, and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.metrics = JobMetrics()
        self.watch = JobWatch([self.metrics], clock=lambda: self.now)

    def submit(self) -> None:
        self.watch.submitting(JOB, "key")

    def run(self, at: float, run: int = 1) -> None:
        self.now = at
        self.watch.saw("job1", RunStarted(run=run, worker_id="w", num_tokens=0))

    def tokens(self, at: float, up_to: int, num_new: int = 1) -> None:
        self.now = at
        chunk = TokenChunk(num_tokens=up_to, text="x", token_ids=(1,) * num_new)
        self.watch.saw("job1", chunk)

    def end(self, at: float, end: JobEnd = END) -> None:
        self.now = at
        self.watch.saw("job1", end)

    def values(self) -> dict[tuple[str, ...], float]:
        return {
            (sample.name.removeprefix("mixfleet_"), *sample.labels.values()): sample.value
            for metric in self.metrics.collect()
            for sample in metric.samples
        }


def test_times_are_taken_from_the_submit_and_between_tokens() -> None:
    seen = Watched()
    seen.submit()
    seen.run(2.0)
    seen.tokens(3.0, 1)
    seen.tokens(3.75, 4, num_new=3)
    seen.end(5.0)
    found = seen.values()
    assert found["request_queue_time_seconds_sum", "tiny"] == 2.0
    assert found["time_to_first_token_seconds_sum", "tiny"] == 3.0
    assert found["inter_token_latency_seconds_sum", "tiny"] == 0.75
    assert found["inter_token_latency_seconds_count", "tiny"] == 3
    assert found["inter_token_latency_seconds_bucket", "tiny", "0.3"] == 3
    assert found["inter_token_latency_seconds_bucket", "tiny", "0.2"] == 0
    assert found["e2e_request_latency_seconds_sum", "tiny"] == 5.0
    assert found["request_time_per_output_token_seconds_sum", "tiny"] == 0.25
    assert found["generation_tokens_total", "tiny"] == 4
    assert found["prompt_tokens_total", "tiny"] == 7
    assert found["jobs_total", "tiny", "finished", "length"] == 1


def test_a_second_run_is_a_redelivery_and_no_second_wait() -> None:
    seen = Watched()
    seen.submit()
    seen.run(1.0)
    seen.watch.saw("job1", Requeued(num_tokens=0, reason="lost"))
    seen.run(9.0, run=2)
    found = seen.values()
    assert found["redeliveries_total", "tiny"] == 1
    assert found["request_queue_time_seconds_count", "tiny"] == 1
    assert found["request_queue_time_seconds_sum", "tiny"] == 1.0


def test_a_failure_is_counted_by_its_code_and_not_timed() -> None:
    seen = Watched()
    seen.submit()
    seen.end(4.0, JobEnd(state="failed", code="prompt_too_long"))
    found = seen.values()
    assert found["jobs_total", "tiny", "failed", "prompt_too_long"] == 1
    assert found["e2e_request_latency_seconds_count", "tiny"] == 0


def test_a_refusal_is_counted_by_its_code() -> None:
    seen = Watched()
    seen.submit()
    seen.watch.refused(JOB, QueueFullError(model="tiny", depth=1, limit=1))
    assert seen.values()["jobs_refused_total", "tiny", QueueFullError.code] == 1


def test_when_counting_began_is_not_exposed() -> None:
    seen = Watched()
    seen.submit()
    seen.run(1.0)
    assert not any(name[0].endswith("_created") for name in seen.values())
