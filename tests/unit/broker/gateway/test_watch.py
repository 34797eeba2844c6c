import logging

import pytest

from mixfleet_broker.errors import QueueFullError
from mixfleet_broker.gateway.watch import JobObserver, JobWatch, WatchedJob
from mixfleet_broker.messages import JobEnd, Requeued, RunStarted
from support.queue_jobs import DONE, chat_job, chunk


class Notes(JobObserver):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.last: WatchedJob | None = None

    def started(self, job: WatchedJob) -> None:
        self.told.append(("started", job.num_runs))

    def tokens(self, job: WatchedJob, num_new: int, since_s: float | None) -> None:
        assert job.num_tokens >= num_new
        self.told.append(("tokens", num_new, since_s))

    def ended(self, job: WatchedJob) -> None:
        self.last = job
        self.told.append(("ended", job.end.state if job.end is not None else None))

    def refused(self, model: str, code: str) -> None:
        self.told.append(("refused", model, code))


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def started(run: int = 1) -> RunStarted:
    return RunStarted(run=run, worker_id="w1", num_tokens=0)


def test_a_job_is_told_from_submit_to_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    notes, clock = Notes(), Clock()
    watch, job = JobWatch([notes], clock), chat_job("a secret question")
    watch.submitting(job, "k1")
    assert (watch.num_jobs, watch.num_waiting()) == (1, 1)
    for event in (started(), chunk(1, 7), chunk(3, 8, 9), DONE):
        clock.now += 0.5
        watch.saw(job.job_id, event)
    assert notes.told == [
        ("started", 1),
        ("tokens", 1, None),
        ("tokens", 2, 0.5),
        ("ended", "finished"),
    ]
    assert (watch.num_jobs, watch.num_waiting()) == (0, 0)
    [line] = caplog.messages
    assert f"job_id={job.job_id} key=k1" in line
    assert "tokens=2 queue_ms=500 ttft_ms=1000 total_ms=2000 runs=1 worker_id=w1" in line
    assert "secret" not in line


def test_a_job_that_is_requeued_waits_again_and_counts_its_runs() -> None:
    notes = Notes()
    watch, job = JobWatch([notes]), chat_job()
    watch.submitting(job, "k1")
    watch.saw(job.job_id, started(1))
    assert watch.num_waiting() == 0
    for _ in range(2):  # told twice, counted once
        watch.saw(job.job_id, Requeued(num_tokens=0, reason="lost"))
        assert watch.num_waiting() == 1
    watch.saw(job.job_id, started(2))
    assert watch.num_waiting() == 0
    assert notes.told == [("started", 1), ("started", 2)]


def test_a_refused_job_is_told_once_and_forgotten() -> None:
    notes = Notes()
    watch, job = JobWatch([notes]), chat_job()
    watch.submitting(job, "k1")
    error = QueueFullError(model="tiny", depth=1, limit=1)
    watch.refused(job, error)
    watch.refused(job, error)
    assert notes.told == [("refused", "tiny", "queue_full")]
    assert (watch.num_jobs, watch.num_waiting()) == (0, 0)


def test_what_comes_of_jobs_that_are_not_watched_is_nobodys() -> None:
    notes = Notes()
    watch = JobWatch([notes])
    watch.saw("unknown", DONE)
    watch.left("unknown")
    assert notes.told == []


def test_a_job_that_was_left_is_forgotten_without_an_end() -> None:
    notes = Notes()
    watch, job = JobWatch([notes]), chat_job()
    watch.submitting(job, "k1")
    watch.left(job.job_id)
    watch.saw(job.job_id, DONE)
    assert notes.told == []
    assert (watch.num_jobs, watch.num_waiting()) == (0, 0)


def test_a_job_that_never_ran_has_an_end_without_times() -> None:
    notes = Notes()
    watch, job = JobWatch([notes]), chat_job()
    watch.submitting(job, "k1")
    watch.saw(job.job_id, JobEnd(state="failed", code="deadline_exceeded", message="late"))
    assert notes.last is not None
    assert (notes.last.started_at, notes.last.num_tokens) == (None, 0)
