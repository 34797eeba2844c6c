import logging
from queue import Empty
from typing import Any

import pytest

from mixfleet_broker.messages import (
    Usage,
)
from mixfleet_broker.queue import Lease
from mixfleet_engine.chat_format import chat_format
from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.generation import SamplingDefaults
from mixfleet_engine.request import GenerateRequest, StepOutput
from mixfleet_engine.simulated import SimulatedEngine
from mixfleet_worker.handoff import (
    Close,
    DrainOrdered,
    EndWrite,
    IOFailed,
    IsolateJob,
    LostJob,
    Mailboxes,
    ReleaseJob,
    StepReport,
    StopClaiming,
    ToIO,
    Write,
)
from mixfleet_worker.intake import Intake
from mixfleet_worker.loop import EngineBrokenError, WorkerLoop
from mixfleet_worker.publisher import Publisher
from support.byte_tokenizer import ByteTokenizer
from support.worker_jobs import MODEL, a_lease, a_payload, a_taken_job

TOKENIZER = ByteTokenizer()
LETTERS = tuple(b"abcdefghijklmnopqrstuvwxyz ")


def an_engine(context_length: int = 200, max_batch_size: int = 4) -> SimulatedEngine:
    return SimulatedEngine(
        token_ids=LETTERS,
        vocab_size=TOKENIZER.vocab_size,
        context_length=context_length,
        max_batch_size=max_batch_size,
    )


class FailingEngine(SimulatedEngine):
    """Raises in the steps whose numbers it was given, counted from 1."""

    def __init__(self, *fails_at: int) -> None:
        super().__init__(token_ids=LETTERS, vocab_size=TOKENIZER.vocab_size, context_length=200)
        self._fails_at = fails_at
        self._num_steps = 0

    def step(self) -> list[StepOutput]:
        self._num_steps += 1
        if self._num_steps in self._fails_at:
            raise RuntimeError("device lost")
        return super().step()


class Fixture:
    """A loop without its I/O thread; the test plays that."""

    def __init__(self, engine: GenerationEngine | None = None, drain_s: float = 30.0) -> None:
        self.now = 0.0
        self.engine = engine or an_engine()
        self.mailboxes = Mailboxes()
        self.is_abandoned = False
        self.loop = WorkerLoop(
            intake=Intake(
                model=MODEL,
                tokenizer=TOKENIZER,
                chat_format=chat_format("chatml", TOKENIZER),
                context_length=self.engine.context_length,
                defaults=SamplingDefaults(),
            ),
            engine=self.engine,
            publisher=Publisher(),
            mailboxes=self.mailboxes,
            worker_id="w1",
            drain_s=drain_s,
            clock=lambda: self.now,
            abandoned=lambda: self.is_abandoned,
        )

    def give(self, job_id: str = "job1", run: int = 1, **sampling: Any) -> Lease:
        lease = a_lease(job_id, run)
        payload = a_payload(job_id, **sampling)
        self.mailboxes.to_loop.put(a_taken_job(payload, lease=lease))
        return lease

    def tick(self) -> StepReport:
        """Do one turn and return its report, which is the last thing it says."""
        self.loop.tick(0.0)
        report = self.said()[-1]
        assert isinstance(report, StepReport)
        return report

    def said(self) -> list[ToIO]:
        items: list[ToIO] = []
        try:
            while True:
                items.append(self.mailboxes.to_io.get_nowait())
        except Empty:
            return items

    def run_out(self) -> list[Write]:
        """Tick until the engine is idle; return all writes."""
        writes = list(self.tick().writes)
        while self.engine.has_work:
            writes += self.tick().writes
        return writes


def text_of(writes: list[Write], job_id: str = "job1") -> str:
    chunks = [w.chunk for w in writes if w.lease.job_id == job_id and w.chunk is not None]
    return "".join(chunk.text for chunk in chunks)


def ends_of(writes: list[Write]) -> dict[str, EndWrite]:
    return {write.lease.job_id: write for write in writes if isinstance(write, EndWrite)}


def answer(**sampling: Any) -> str:
    """What an undisturbed worker says."""
    worker = Fixture()
    worker.give(**sampling)
    return text_of(worker.run_out())


def test_a_job_runs_to_its_end() -> None:
    worker = Fixture()
    lease = worker.give(max_tokens=5)
    writes = worker.run_out()
    assert [w.chunk.num_tokens for w in writes if w.chunk is not None] == [1, 2, 3, 4, 5]
    end = ends_of(writes)["job1"]
    assert (end.lease, end.end.state, end.end.finish_reason) == (lease, "finished", "length")
    assert len(text_of(writes)) == 5


def test_every_turn_reports_even_when_there_is_nothing_to_do() -> None:
    assert Fixture().tick() == StepReport(writes=(), free_slots=4, num_taken=0)


def test_the_report_counts_the_jobs_taken_and_the_slots_left() -> None:
    worker = Fixture()
    worker.give("a", max_tokens=50)
    worker.give("b", max_tokens=50)
    report = worker.tick()
    assert (report.num_taken, report.free_slots) == (2, 2)


def test_few_free_kv_tokens_mean_few_free_slots() -> None:
    engine = SimulatedEngine(
        token_ids=LETTERS, vocab_size=262, context_length=96, max_batch_size=8, num_blocks=12
    )
    worker = Fixture(engine)
    worker.give("a", max_tokens=40)
    report = worker.tick()
    assert engine.free_slots == 7
    assert report.free_slots == engine.free_tokens // 96 == 1


def test_a_new_job_joins_between_steps_and_changes_nobodys_text() -> None:
    alone = answer(question="first", max_tokens=8)
    worker = Fixture()
    worker.give("job1", question="first", max_tokens=8)
    writes = list(worker.tick().writes)
    worker.give("job2", question="second", max_tokens=8)
    writes += worker.run_out()
    assert text_of(writes, "job1") == alone
    assert len(text_of(writes, "job2")) == 8


def test_a_bad_job_is_rejected_while_its_neighbours_go_on() -> None:
    worker = Fixture()
    worker.give("good", max_tokens=3)
    worker.mailboxes.to_loop.put(a_taken_job(b"\xc1", lease=a_lease("bad")))
    worker.give("long", max_tokens=10_000)
    ends = ends_of(worker.run_out())
    assert ends["good"].end.state == "finished"
    assert (ends["bad"].end.state, ends["bad"].end.code) == ("failed", "invalid_request")
    assert ends["long"].end.code == "prompt_too_long"
    assert "10000" in (ends["long"].end.message or "")


def test_a_surprise_in_intake_fails_that_job_only(caplog: pytest.LogCaptureFixture) -> None:
    class Picky(SimulatedEngine):
        def submit(self, request: GenerateRequest) -> None:
            if request.request_id == "bad":
                raise ZeroDivisionError("bug")
            super().submit(request)

    worker = Fixture(Picky(token_ids=LETTERS, vocab_size=262, context_length=200))
    worker.give("bad", max_tokens=3)
    worker.give("good", max_tokens=3)
    with caplog.at_level(logging.ERROR):
        ends = ends_of(worker.run_out())
    assert ends["bad"].end.code == "engine_failed"
    assert ends["good"].end.state == "finished"
    assert "job_id=bad" in caplog.text


def test_a_lost_job_leaves_the_engine_before_the_next_step() -> None:
    worker = Fixture()
    lease = worker.give(max_tokens=50)
    worker.tick()
    worker.mailboxes.to_loop.put(LostJob(lease=lease))
    assert worker.tick().writes == ()
    assert not worker.engine.has_work


def test_a_job_lost_before_it_began_never_begins() -> None:
    worker = Fixture()
    lease = worker.give()
    worker.mailboxes.to_loop.put(LostJob(lease=lease))
    assert worker.tick().writes == ()
    assert not worker.engine.has_work


def test_a_job_lost_and_claimed_again_runs_under_its_new_lease() -> None:
    worker = Fixture()
    old = worker.give(run=1, max_tokens=6)
    worker.tick()
    worker.mailboxes.to_loop.put(LostJob(lease=old))
    new = worker.give(run=2, max_tokens=6)
    writes = worker.run_out()
    assert {write.lease for write in writes} == {new}
    assert len(text_of(writes)) == 6


def test_the_loss_of_an_older_run_leaves_the_newer_one_alone() -> None:
    worker = Fixture()
    worker.give(run=2, max_tokens=6)
    worker.tick()
    worker.mailboxes.to_loop.put(LostJob(lease=a_lease(run=1)))
    assert len(worker.tick().writes) == 1


def test_a_stop_string_frees_the_slot_at_once() -> None:
    full = answer(max_tokens=40)
    stop = full[10:13]
    worker = Fixture()
    worker.give(max_tokens=40, stop=(stop,))
    writes = worker.run_out()
    assert text_of(writes) == full[: full.index(stop)]
    assert ends_of(writes)["job1"].end.finish_reason == "stop"
    assert worker.engine.free_slots == 4


@pytest.mark.parametrize("num_delivered", [1, 7, 11])
def test_a_continued_answer_is_the_undisturbed_one(num_delivered: int) -> None:
    full = answer(max_tokens=12)
    worker = Fixture()
    delivered = tuple(full[:num_delivered].encode())
    payload = a_payload(max_tokens=12)
    worker.mailboxes.to_loop.put(a_taken_job(payload, delivered=delivered))
    writes = worker.run_out()
    assert full[:num_delivered] + text_of(writes) == full
    usage = ends_of(writes)["job1"].end.usage
    assert usage is not None
    assert usage.completion_tokens == 12


def test_delivered_tokens_that_the_model_does_not_have_fail_that_job_only() -> None:
    worker = Fixture()
    payload = a_payload("bad", max_tokens=9)
    job = a_taken_job(payload, lease=a_lease("bad"), delivered=(100_000,))
    worker.mailboxes.to_loop.put(job)
    worker.give("good", max_tokens=3)
    ends = ends_of(worker.run_out())
    assert (ends["bad"].end.code, ends["good"].end.state) == ("invalid_request", "finished")


def test_an_answer_that_was_delivered_whole_ends_without_a_step() -> None:
    worker = Fixture()
    payload = a_payload(max_tokens=3)
    worker.mailboxes.to_loop.put(a_taken_job(payload, delivered=tuple(b"abc")))
    (end,) = worker.tick().writes
    assert isinstance(end, EndWrite)
    assert end.end.finish_reason == "length"
    assert end.end.usage == Usage(prompt_tokens=21, completion_tokens=3)


def test_an_engine_error_fails_the_one_job_in_flight_and_the_worker_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = Fixture(FailingEngine(2))
    worker.give("a", max_tokens=9)
    with caplog.at_level(logging.ERROR):
        ends = ends_of(worker.run_out())
    assert {job_id: end.end.code for job_id, end in ends.items()} == {"a": "engine_failed"}
    assert "device lost" in (ends["a"].end.message or "")
    assert "job_ids=a " in caplog.text
    worker.give("c", max_tokens=3)
    assert ends_of(worker.run_out())["c"].end.state == "finished"


def test_of_several_jobs_none_is_failed_by_an_engine_error_but_each_is_to_run_alone() -> None:
    worker = Fixture(FailingEngine(2))
    worker.give("a", max_tokens=9)
    worker.give("b", max_tokens=9)
    worker.loop.tick(0.0)
    worker.loop.tick(0.0)
    said = worker.said()
    isolated = [item.lease.job_id for item in said if isinstance(item, IsolateJob)]
    assert isolated == ["a", "b"]
    assert not ends_of([w for item in said if isinstance(item, StepReport) for w in item.writes])
    assert not worker.engine.has_work


def test_a_job_on_which_an_engine_fails_that_has_just_failed_is_not_blamed() -> None:
    worker = Fixture(FailingEngine(1, 2))
    worker.give("a")
    worker.loop.tick(0.0)
    worker.give("b")
    with pytest.raises(EngineBrokenError):
        worker.loop.run()
    said = worker.said()
    assert [item.lease.job_id for item in said if isinstance(item, IsolateJob)] == ["b"]


def test_an_ordered_drain_is_a_drain() -> None:
    worker = Fixture()
    worker.mailboxes.to_loop.put(DrainOrdered())
    worker.loop.run()
    assert any(isinstance(item, StopClaiming) for item in worker.said())


def test_engine_errors_with_good_steps_between_do_not_end_the_worker() -> None:
    worker = Fixture(FailingEngine(1, 3))
    for job_id in "abc":
        worker.give(job_id, max_tokens=4)
        worker.run_out()


def test_a_second_engine_error_in_a_row_ends_the_worker_and_releases_its_jobs() -> None:
    worker = Fixture(FailingEngine(1, 2))
    worker.give("a")
    assert ends_of(worker.run_out())["a"].end.code == "engine_failed"
    worker.give("b")
    with pytest.raises(EngineBrokenError, match="device lost"):
        worker.loop.run()
    assert isinstance(worker.said()[-1], Close)


def test_an_error_of_the_io_thread_ends_the_worker() -> None:
    worker = Fixture()
    worker.mailboxes.to_loop.put(IOFailed(ValueError("bug")))
    with pytest.raises(ValueError, match="bug"):
        worker.loop.run()


def test_a_stopped_idle_worker_leaves_at_once() -> None:
    worker = Fixture()
    worker.loop.stop()
    worker.loop.run()
    said = worker.said()
    assert isinstance(said[-2], StopClaiming)
    assert isinstance(said[-1], Close)


def test_a_stopped_worker_finishes_what_it_has() -> None:
    worker = Fixture()
    worker.give(max_tokens=20)
    worker.tick()
    worker.loop.stop()
    worker.loop.run()
    writes = [w for item in worker.said() if isinstance(item, StepReport) for w in item.writes]
    assert ends_of(writes)["job1"].end.state == "finished"


def test_a_draining_worker_gives_back_jobs_that_come_too_late() -> None:
    late = a_taken_job(a_payload("late"), lease=a_lease("late"))
    num_steps = 0

    def give_in_the_third_step(_: float) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:  # by then the worker drains
            worker.mailboxes.to_loop.put(late)

    engine = SimulatedEngine(
        token_ids=LETTERS,
        vocab_size=TOKENIZER.vocab_size,
        context_length=200,
        step_s=1.0,
        sleep=give_in_the_third_step,
    )
    worker = Fixture(engine)
    worker.give("a", max_tokens=6)
    worker.loop.tick(0.0)
    worker.loop.stop()
    worker.loop.run()
    said = worker.said()
    assert ReleaseJob(lease=late.claimed.lease) in said
    writes = [w for item in said if isinstance(item, StepReport) for w in item.writes]
    assert set(ends_of(writes)) == {"a"}


def test_the_drain_ends_when_its_time_is_over() -> None:
    worker = Fixture(drain_s=0.0)
    worker.give(max_tokens=150)
    worker.tick()
    worker.loop.stop()
    worker.loop.run()
    said = worker.said()
    assert not any(ends_of(list(i.writes)) for i in said if isinstance(i, StepReport))
    assert isinstance(said[-1], Close)


def test_a_second_stop_leaves_at_once() -> None:
    worker = Fixture()
    worker.give(max_tokens=150)
    worker.tick()
    worker.loop.stop()
    worker.loop.stop()
    worker.loop.run()
    said = worker.said()
    assert sum(isinstance(item, StepReport) for item in said) <= 1
    assert isinstance(said[-1], Close)


def test_a_worker_whose_parent_is_gone_drains() -> None:
    worker = Fixture()
    worker.is_abandoned = True
    worker.loop.run()
    assert isinstance(worker.said()[-1], Close)


def test_no_prompt_or_answer_is_logged_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    worker = Fixture(FailingEngine(9))
    with caplog.at_level(logging.INFO):
        worker.give("a", question="my secret", max_tokens=3)
        worker.run_out()
        worker.give("b", question="my secret", max_tokens=100)
        worker.give("c", question="my secret", max_tokens=10_000)
        worker.run_out()
    assert caplog.records
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"logit_bias": ((262, 1.0),)}, "logit_bias holds 262: token ids go from 0 to 261"),
        ({"prompt_token_ids": (9, 999)}, "prompt_token_ids holds 999: token ids go from 0 to 261"),
    ],
)
def test_a_token_outside_the_vocabulary_rejects_its_job_alone(
    given: dict[str, Any], named: str
) -> None:
    worker = Fixture()
    worker.give("good", max_tokens=5)
    worker.give("bad", max_tokens=5, **given)
    ends = ends_of(worker.run_out())
    assert ends["good"].end.state == "finished"
    bad = ends["bad"].end
    assert (bad.state, bad.code, bad.message) == ("failed", "invalid_request", named)


def test_an_answer_that_ignores_the_end_goes_on_to_its_longest() -> None:
    def num_tokens(**sampling: Any) -> int:
        worker = Fixture(
            SimulatedEngine(
                token_ids=LETTERS, vocab_size=TOKENIZER.vocab_size, answer_lengths=range(3, 4)
            )
        )
        worker.give(max_tokens=20, **sampling)
        usage = ends_of(worker.run_out())["job1"].end.usage
        assert usage is not None
        return usage.completion_tokens

    assert num_tokens() == 3
    assert num_tokens(ignore_eos=True) == 20
