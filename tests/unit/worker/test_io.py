import logging
import threading
from dataclasses import replace
from queue import Empty

import pytest

from mixfleet_broker.errors import BrokerError, MessageError
from mixfleet_broker.messages import (
    AnswerPart,
    JobEnd,
    TokenChunk,
    Usage,
)
from mixfleet_broker.orders import READ_YOUR_ORDER
from mixfleet_broker.queue import Lease
from mixfleet_worker.handoff import (
    Close,
    DrainOrdered,
    EndWrite,
    IOFailed,
    IsolateJob,
    JobTimes,
    LostJob,
    Mailboxes,
    ReleaseJob,
    StepReport,
    StopClaiming,
    TakenJob,
    ToLoop,
    Write,
)
from mixfleet_worker.io import BrokerIO
from support.fake_session import FakeBroker, FakeSession, chunk_write

LEASE_S = 15.0
STALL_S = 60.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Fixture:
    """The I/O side of one worker, driven turn by turn; the test plays the loop."""

    def __init__(self, slots: int = 2, session: FakeSession | None = None) -> None:
        self.broker = FakeBroker()
        self.clock = Clock()
        self.mailboxes = Mailboxes()
        self.io = BrokerIO(
            session=session or self.broker.session(),
            mailboxes=self.mailboxes,
            worker_id="w1",
            lease_s=LEASE_S,
            stall_s=STALL_S,
            clock=self.clock,
        )
        self.slots = slots
        self.num_taken = 0

    def turn(self, *writes: Write, free_slots: int | None = None) -> list[ToLoop]:
        """Report one step of the loop, let the I/O side work, return what came to the loop."""
        report = StepReport(
            writes=writes,
            free_slots=self.slots if free_slots is None else free_slots,
            num_taken=self.num_taken,
        )
        self.mailboxes.to_io.put(report)
        self.io.turn()
        return self.received()

    def received(self) -> list[ToLoop]:
        items: list[ToLoop] = []
        try:
            while True:
                items.append(self.mailboxes.to_loop.get_nowait())
        except Empty:
            self.num_taken += sum(isinstance(item, TakenJob) for item in items)
            return items

    def take(self, job_id: str = "a") -> Lease:
        """Push one job and let it be claimed."""
        self.broker.push(job_id)
        (taken,) = self.turn()
        assert isinstance(taken, TakenJob)
        self.slots -= 1
        return taken.claimed.lease


def an_end(lease: Lease, num_tokens: int = 1, text: str = "x") -> EndWrite:
    return EndWrite(
        lease=lease,
        end=JobEnd(
            state="finished",
            finish_reason="stop",
            usage=Usage(prompt_tokens=1, completion_tokens=num_tokens),
        ),
        chunk=TokenChunk(num_tokens=num_tokens, text=text, token_ids=(num_tokens,)),
        times=JobTimes(claimed_at=100.0, first_token_at=101.0, ended_at=102.0),
    )


def job_ids(items: list[ToLoop]) -> list[str]:
    return [item.claimed.lease.job_id for item in items if isinstance(item, TakenJob)]


# Claiming


def test_it_claims_as_many_jobs_as_the_engine_has_room_for() -> None:
    worker = Fixture(slots=2)
    for job_id in "abc":
        worker.broker.push(job_id)
    assert job_ids(worker.turn()) == ["a", "b"]
    assert worker.broker.queued == ["c"]


def test_it_claims_nothing_before_the_loop_has_spoken() -> None:
    worker = Fixture()
    worker.broker.push("a")
    worker.io.turn()
    assert worker.received() == []
    assert worker.broker.queued == ["a"]


def test_jobs_on_their_way_to_the_loop_take_slots() -> None:
    worker = Fixture(slots=2)
    for job_id in "abc":
        worker.broker.push(job_id)
    worker.turn()
    worker.num_taken = 0  # the loop has not yet received them and says the same as before
    assert job_ids(worker.turn(free_slots=2)) == []


def test_a_new_job_joins_a_busy_worker_at_the_next_flush() -> None:
    worker = Fixture(slots=2)
    lease = worker.take("a")
    worker.broker.push("b")
    assert job_ids(worker.turn(chunk_write(lease, 1))) == ["b"]


def test_a_busy_worker_does_not_claim_while_nobody_waits() -> None:
    worker = Fixture(slots=2)
    lease = worker.take("a")
    worker.turn(chunk_write(lease, 1))
    worker.broker.calls.clear()
    worker.turn(chunk_write(lease, 2))
    assert worker.broker.calls == ["flush"]


def test_a_full_worker_claims_nothing_and_asks_for_words_at_each_step() -> None:
    worker = Fixture(slots=1)
    worker.take("a")
    worker.broker.calls.clear()
    worker.turn(free_slots=0)
    assert worker.broker.calls == ["flush"]
    worker.io.turn()  # no step since then
    assert worker.broker.calls == ["flush"]


def test_only_an_idle_worker_waits_for_the_bell() -> None:
    worker = Fixture()
    worker.turn()
    assert worker.broker.calls[-1] == "wait_for_jobs"
    worker.take("a")
    worker.broker.calls.clear()
    worker.turn()
    assert "wait_for_jobs" not in worker.broker.calls


def test_a_claim_whose_reply_was_lost_gives_the_same_jobs() -> None:
    worker = Fixture(slots=2)
    worker.broker.push("a")
    worker.broker.lost_replies.append("claim")
    assert worker.turn() == []
    worker.clock.now += 1
    assert job_ids(worker.turn()) == ["a"]
    assert worker.broker.jobs["a"].attempt == 1


def test_a_continued_job_comes_with_the_tokens_that_were_delivered() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.turn(chunk_write(lease, 1), chunk_write(lease, 2))
    worker.broker.reap_job("a")
    second = Fixture(session=worker.broker.session("w2"))
    (taken,) = second.turn()
    assert isinstance(taken, TakenJob)
    assert taken.delivered_token_ids == (1, 2)
    assert taken.claimed.attempt == 2


def test_a_claimed_job_survives_an_outage_before_it_is_handed_over() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.turn(chunk_write(lease, 1))
    worker.broker.reap_job("a")
    second = Fixture(session=worker.broker.session("w2"))
    worker.broker.lost_replies.append("delivered_tokens")
    assert second.turn() == []
    second.clock.now += 1
    assert job_ids(second.turn()) == ["a"]


def test_a_channel_that_is_not_legible_fails_its_job_only() -> None:
    class Illegible(FakeSession):
        def delivered_tokens(self, job_id: str) -> tuple[int, ...]:
            raise MessageError(f"nonsense in {job_id}")

    first = Fixture()
    lease = first.take("a")
    first.turn(chunk_write(lease, 1))
    first.broker.reap_job("a")
    first.broker.push("b")
    second = Fixture(session=Illegible(first.broker, "w2"))
    assert set(job_ids(second.turn())) == {"b"}
    second.turn()
    (end,) = first.broker.jobs["a"].ends
    assert (end.state, end.code) == ("failed", MessageError.code)


# Writing


def test_one_flush_carries_the_chunks_of_all_jobs() -> None:
    worker = Fixture(slots=2)
    worker.broker.push("a")
    worker.broker.push("b")
    leases = [t.claimed.lease for t in worker.turn() if isinstance(t, TakenJob)]
    worker.broker.calls.clear()
    worker.turn(*(chunk_write(lease, 1) for lease in leases), free_slots=0)
    assert worker.broker.calls == ["flush"]
    assert [worker.broker.jobs[job_id].token_ids for job_id in "ab"] == [(1,), (1,)]


def test_the_last_chunk_and_the_end_go_together_and_free_the_job(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = Fixture()
    lease = worker.take("a")
    with caplog.at_level(logging.INFO):
        worker.turn(an_end(lease))
    job = worker.broker.jobs["a"]
    assert (job.text, [end.finish_reason for end in job.ends]) == ("x", ["stop"])
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("job ended")]
    for part in ("job_id=a", "state=finished", "reason=stop", "tokens=1", "worker_id=w1"):
        assert part in line
    assert "ttft_s=1.000" in line
    assert "total_s=2.000" in line


def test_a_lost_reply_of_a_flush_repeats_nothing_to_the_reader() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.broker.lost_replies.append("flush")
    worker.turn(chunk_write(lease, 1, "one "))
    worker.clock.now += 1
    worker.turn(chunk_write(lease, 2, "two "))
    worker.turn(chunk_write(lease, 3, "three"))
    worker.turn()
    job = worker.broker.jobs["a"]
    assert (job.text, job.token_ids) == ("one two three", (1, 2, 3))


def test_a_lost_reply_of_an_end_ends_the_job_once() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.broker.lost_replies.append("flush")
    worker.turn(an_end(lease))
    worker.clock.now += 1
    worker.turn()
    job = worker.broker.jobs["a"]
    assert (job.text, len(job.ends)) == ("x", 1)


def test_a_refused_chunk_of_a_lost_job_stops_it_at_once() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.broker.cancel("a")
    assert worker.turn(chunk_write(lease, 1)) == [LostJob(lease=lease)]
    assert worker.turn(chunk_write(lease, 2)) == []
    assert worker.broker.jobs["a"].token_ids == ()


def test_late_writes_of_a_lost_run_never_reach_the_run_that_followed() -> None:
    worker = Fixture(slots=2)
    old = worker.take("a")
    worker.broker.reap_job("a")
    # Nobody has it yet, so one more chunk is taken; the next run goes on after it.
    lost, taken = worker.turn(chunk_write(old, 1, "one "))
    assert lost == LostJob(lease=old)
    assert isinstance(taken, TakenJob)
    new = taken.claimed.lease
    assert (new.run > old.run, taken.delivered_token_ids) == (True, (1,))
    worker.turn(chunk_write(old, 2, "old"), chunk_write(new, 2, "new"))
    assert worker.broker.jobs["a"].text == "one new"


def test_a_redis_that_lost_its_last_writes_is_told_of_them_again_unnoticed_by_the_loop() -> None:
    worker = Fixture()
    lease = worker.take("a")
    for number in (1, 2, 3):
        worker.turn(chunk_write(lease, number, str(number)))
    worker.broker.forget_after("a", 1)
    for number in (4, 5):
        assert worker.turn(chunk_write(lease, number, str(number))) == []
    for _ in range(3):
        worker.turn()
    assert worker.broker.jobs["a"].text == "12345"
    worker.broker.forget_after("a", 4)
    worker.turn(an_end(lease, 6, "6"))
    worker.turn()
    worker.turn()
    job = worker.broker.jobs["a"]
    assert (job.text, len(job.ends), job.num_losses) == ("123456", 1, 0)


def test_a_job_of_which_redis_has_lost_too_much_goes_back_to_the_queue() -> None:
    worker = Fixture()
    lease = worker.take("a")
    for number in (1, 2):
        worker.turn(chunk_write(lease, number))
        worker.clock.now += LEASE_S / 2 + 1
    worker.turn(chunk_write(lease, 3))
    worker.broker.forget_after("a", 0)
    assert worker.turn(chunk_write(lease, 4)) == [LostJob(lease=lease)]
    [taken] = worker.turn()
    assert isinstance(taken, TakenJob)
    assert (taken.claimed.num_delivered, taken.claimed.num_losses) == (0, 0)


# Leases


def test_leases_are_renewed_every_third_of_their_length() -> None:
    worker = Fixture()
    worker.take("a")
    worker.broker.calls.clear()
    worker.clock.now += LEASE_S / 3 - 0.1
    worker.turn()
    assert "renew" not in worker.broker.calls
    worker.clock.now += 0.1
    worker.turn()
    assert [c for c in worker.broker.calls if c != "flush"] == ["renew", "reap", "beat"]


def test_a_cancelled_job_in_prefill_is_found_at_the_renewal() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.broker.cancel("a")
    worker.clock.now += LEASE_S / 3
    assert worker.turn() == [LostJob(lease=lease)]


def test_a_stuck_loop_loses_its_leases_and_gets_no_jobs() -> None:
    worker = Fixture(slots=2)
    worker.take("a")
    stuck_since = worker.clock.now
    while worker.clock.now <= stuck_since + STALL_S:
        worker.clock.now += LEASE_S / 3
        worker.io.turn()
    worker.broker.push("b")
    worker.broker.calls.clear()
    worker.clock.now += LEASE_S / 3
    worker.io.turn()
    assert worker.broker.calls == ["reap", "beat"]
    assert worker.broker.queued == ["b"]


def test_a_loop_that_moves_again_is_trusted_again() -> None:
    worker = Fixture(slots=2)
    worker.take("a")
    worker.clock.now += STALL_S + 1
    worker.io.turn()
    worker.clock.now += LEASE_S / 3
    worker.broker.push("b")
    worker.broker.calls.clear()
    assert job_ids(worker.turn()) == ["b"]
    assert "renew" in worker.broker.calls


def test_the_record_shows_busy_and_idle_without_waiting_for_the_next_beat() -> None:
    worker = Fixture()
    worker.turn()
    lease = worker.take("a")
    worker.turn(an_end(lease))
    assert [activity.state for activity in worker.broker.activities] == ["idle", "busy", "idle"]


# Outages


def test_chunks_of_an_outage_arrive_in_one_piece_after_it() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.turn(chunk_write(lease, 1, "a"))
    worker.broker.is_down = True
    for number, text in ((2, "b"), (3, "c"), (4, "d")):
        worker.turn(chunk_write(lease, number, text))
        worker.clock.now += 1
    worker.broker.is_down = False
    for _ in range(3):
        worker.clock.now += 3
        worker.turn()
    job = worker.broker.jobs["a"]
    assert (job.text, job.token_ids) == ("abcd", (1, 2, 3, 4))


def test_redis_is_left_alone_while_backing_off() -> None:
    worker = Fixture()
    worker.broker.is_down = True
    worker.turn()
    worker.broker.calls.clear()
    for _ in range(5):
        worker.turn()
    assert worker.broker.calls == []
    worker.clock.now += 2
    worker.turn()
    assert worker.broker.calls


def test_an_outage_longer_than_the_lease_stops_the_job_and_releases_it_afterwards() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.broker.is_down = True
    worker.turn(chunk_write(lease, 1))
    worker.clock.now += LEASE_S + 1
    assert worker.turn() == [LostJob(lease=lease)]
    worker.broker.is_down = False
    worker.clock.now += 3
    worker.slots += 1
    (taken,) = worker.turn()
    assert isinstance(taken, TakenJob)
    assert (taken.claimed.lease.job_id, taken.claimed.num_losses) == ("a", 0)


def test_a_complete_answer_outlives_an_outage_longer_than_the_lease() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.broker.is_down = True
    worker.turn(an_end(lease, text="whole"))
    worker.clock.now += LEASE_S + 1
    assert worker.turn() == []
    worker.broker.is_down = False
    worker.clock.now += 3
    worker.turn()
    assert worker.broker.jobs["a"].text == "whole"
    assert len(worker.broker.jobs["a"].ends) == 1


@pytest.mark.parametrize(("away_s", "spares"), [(LEASE_S / 2, False), (LEASE_S, True)])
def test_after_an_outage_in_which_leases_may_have_ended_those_of_others_are_spared(
    away_s: float, spares: bool
) -> None:
    worker = Fixture()
    worker.turn()
    worker.broker.is_down = True
    worker.clock.now += away_s
    worker.turn()
    worker.broker.is_down = False
    worker.clock.now += 1
    worker.broker.calls.clear()
    worker.turn()
    assert ("reap" in worker.broker.calls, worker.broker.reaping_claims[-1]) == (
        not spares,
        not spares,
    )
    worker.clock.now += LEASE_S / 2
    worker.turn()
    worker.clock.now += LEASE_S / 2
    worker.turn()
    assert "reap" in worker.broker.calls
    assert worker.broker.reaping_claims[-1]


# Stopping


def test_a_draining_worker_finishes_its_jobs_and_claims_no_more() -> None:
    worker = Fixture(slots=2)
    lease = worker.take("a")
    worker.mailboxes.to_io.put(StopClaiming())
    worker.broker.push("b")
    assert worker.turn(chunk_write(lease, 1)) == []
    worker.turn(an_end(lease, 2))
    assert len(worker.broker.jobs["a"].ends) == 1
    assert worker.broker.queued == ["b"]
    assert worker.broker.activities[-1].state == "draining"


def test_a_job_that_the_loop_gives_back_is_released() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.mailboxes.to_io.put(StopClaiming())
    worker.mailboxes.to_io.put(ReleaseJob(lease=lease))
    worker.turn()
    assert worker.broker.queued == ["a"]
    assert worker.broker.jobs["a"].num_losses == 0


def run_to_the_end(worker: Fixture) -> None:
    """Run the thread's own body, which ends because a `Close` waits for it."""
    thread = threading.Thread(target=worker.io.run)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_closing_writes_what_is_left_releases_the_rest_and_signs_off() -> None:
    worker = Fixture(slots=3)
    ended, running = worker.take("a"), worker.take("b")
    worker.mailboxes.to_io.put(
        StepReport(
            writes=(an_end(ended), chunk_write(running, 1, "so far")), free_slots=0, num_taken=2
        )
    )
    worker.mailboxes.to_io.put(Close())
    run_to_the_end(worker)
    assert len(worker.broker.jobs["a"].ends) == 1
    assert worker.broker.jobs["b"].text == "so far"
    assert worker.broker.queued == ["b"]
    assert worker.broker.signed_off == ["w1"]


def test_closing_writes_all_parts_of_an_answer_one_after_the_other() -> None:
    worker = Fixture(slots=3)
    lease = worker.take("a")
    writes = []
    parts: tuple[AnswerPart, ...] = ("text", "tool_calls") * 3
    for number, part in enumerate(parts, 1):
        write = chunk_write(lease, number, f"{number}")
        writes.append(replace(write, chunk=replace(write.chunk, part=part)))
    end = an_end(lease, 7)
    worker.mailboxes.to_io.put(StepReport(writes=(*writes, end), free_slots=0, num_taken=1))
    worker.mailboxes.to_io.put(Close())
    run_to_the_end(worker)
    job = worker.broker.jobs["a"]
    assert job.token_ids == tuple(range(1, 8))
    assert [chunk.part for chunk in job.chunks] == [*parts, "text"]
    assert len(job.ends) == 1


def test_closing_gives_back_jobs_whose_claim_was_never_answered() -> None:
    worker = Fixture()
    worker.broker.push("a")
    worker.broker.lost_replies.append("claim")
    worker.turn()
    worker.mailboxes.to_io.put(Close())
    run_to_the_end(worker)
    assert worker.broker.queued == ["a"]


def test_closing_waits_a_while_for_a_broker_that_is_away() -> None:
    worker = Fixture()
    lease = worker.take("a")
    worker.broker.lost_replies += ["flush", "flush"]
    worker.mailboxes.to_io.put(StepReport(writes=(an_end(lease),), free_slots=0, num_taken=1))
    worker.mailboxes.to_io.put(Close())
    run_to_the_end(worker)
    assert len(worker.broker.jobs["a"].ends) == 1
    assert worker.broker.signed_off == ["w1"]


def test_an_error_of_ours_reaches_the_loop() -> None:
    class Broken(FakeSession):
        def reap(self) -> None:
            raise RuntimeError("bug")

    worker = Fixture()
    worker = Fixture(session=Broken(worker.broker, "w1"))
    run_to_the_end(worker)
    (item,) = worker.received()
    assert isinstance(item, IOFailed)
    assert str(item.error) == "bug"


def test_a_reap_that_is_refused_does_not_stop_the_jobs_in_hand() -> None:
    class Refusing(FakeSession):
        def reap(self) -> None:
            raise BrokerError("Redis refuses: a key of a wrong type")

    broker = FakeBroker()
    worker = Fixture(session=Refusing(broker, "w1"))
    broker.push("a")
    (taken,) = worker.turn()
    assert isinstance(taken, TakenJob)
    worker.clock.now += LEASE_S / 3
    worker.turn(an_end(taken.claimed.lease))
    assert broker.jobs["a"].text == "x"
    assert len(broker.jobs["a"].ends) == 1


# What others have to say


def test_a_paused_worker_claims_nothing_goes_on_with_its_jobs_and_waits_for_a_word() -> None:
    worker = Fixture(slots=4)
    lease = worker.take("a")
    worker.broker.order = "pause"
    worker.broker.words = [READ_YOUR_ORDER]
    worker.turn(chunk_write(lease, 1))
    worker.broker.push("b")
    assert job_ids(worker.turn(chunk_write(lease, 2))) == []
    assert worker.broker.jobs["a"].num_tokens == 2
    assert [activity.state for activity in worker.broker.activities][-1] == "paused"
    worker.turn(an_end(lease, 3))
    worker.broker.calls.clear()
    worker.turn()
    assert worker.broker.calls[-1] == "wait_for_word"
    worker.broker.order = None
    worker.broker.words = [READ_YOUR_ORDER]
    worker.turn()
    assert job_ids(worker.turn()) == ["b"]
    assert [activity.state for activity in worker.broker.activities][-1] == "busy"


def test_a_beat_brings_an_order_whose_word_was_lost() -> None:
    worker = Fixture(slots=2)
    worker.turn()
    worker.broker.order = "pause"
    worker.clock.now += LEASE_S / 3
    worker.turn()
    worker.broker.push("a")
    assert job_ids(worker.turn()) == []


def test_an_ordered_drain_is_told_to_the_loop_once() -> None:
    worker = Fixture(slots=2)
    worker.broker.order = "drain"
    heard: list[ToLoop] = []
    for _ in range(3):
        worker.clock.now += LEASE_S / 3
        heard += worker.turn()
    assert sum(isinstance(item, DrainOrdered) for item in heard) == 1


def test_a_word_of_a_cancel_stops_the_run_at_once() -> None:
    worker = Fixture(slots=2)
    lease = worker.take("a")
    worker.broker.cancel("a")
    worker.broker.words = [f"c:a:{lease.token}"]
    # A step of prefill: nothing to write.
    assert worker.turn() == [LostJob(lease=lease)]


def test_a_word_about_an_earlier_run_stops_nothing() -> None:
    worker = Fixture(slots=2)
    worker.take("a")
    worker.broker.words = ["c:a:another", "c:unknown:t1", "what"]
    assert worker.turn() == []


def test_a_worker_says_whether_it_is_idle_when_it_claims() -> None:
    worker = Fixture(slots=3)
    lease = worker.take("a")
    worker.broker.push("b")
    worker.turn(chunk_write(lease, 1))
    assert worker.broker.idle_claims == [True, False]


def test_a_slot_that_is_not_yet_free_is_waited_for_at_the_loop_not_at_the_bell() -> None:
    worker = Fixture(slots=1)
    lease = worker.take("a")
    worker.broker.words = [f"c:a:{lease.token}"]
    worker.broker.calls.clear()
    worker.turn(free_slots=0)
    assert worker.broker.calls == ["flush", "beat"]  # it became idle
    worker.turn(free_slots=1)
    assert worker.broker.calls[-1] == "wait_for_jobs"


def test_beside_a_job_that_is_to_run_alone_nothing_is_claimed() -> None:
    worker = Fixture(slots=4)
    worker.broker.alone.add("a")
    lease = worker.take("a")
    worker.broker.push("b")
    assert job_ids(worker.turn(chunk_write(lease, 1))) == []
    assert job_ids(worker.turn(an_end(lease, 2))) == ["b"]


def test_jobs_to_be_isolated_are_handed_back_at_once() -> None:
    worker = Fixture(slots=2)
    lease = worker.take("a")
    worker.mailboxes.to_io.put(IsolateJob(lease=lease))
    worker.turn()
    assert worker.broker.isolated == ["a"]
