"""What the pipelined engine does otherwise: the order of launches and reads, and its idle end."""

import random
from collections.abc import Callable

import pytest

from mixfleet_engine.engine import Engine
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.scheduler import Scheduler
from support.engine_requests import Answers, make_request, run_to_end, step_into
from support.fake_runner import FakeRunner, slow_answer

VOCAB = 12


def make_engine(
    clock: Callable[[], float] = lambda: 0.0, *, num_blocks: int = 32
) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(num_blocks=num_blocks, block_size=4, vocab_size=VOCAB)
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=4,
        max_batch_size=4,
        max_step_tokens=16,
        context_length=64,
        vocab_size=VOCAB,
    )
    return Engine(runner, scheduler, clock=clock, pipelined=True), runner


def test_each_step_is_launched_before_the_one_before_is_read() -> None:
    engine, runner = make_engine()
    request = make_request(max_tokens=4)
    engine.submit(request)
    outputs = engine.step()
    assert runner.calls == [("launch", 0), ("launch", 1), ("read", 0)]
    outputs += engine.step()
    assert runner.calls[3:] == [("launch", 2), ("read", 1)]
    outputs += engine.step()
    assert runner.calls[5:] == [("launch", 3), ("read", 2)]
    outputs += engine.step()
    assert runner.calls[7:] == [("read", 3)], "the answer ends with it, so nothing is launched"
    assert tuple(o.token_ids[0] for o in outputs) == slow_answer(request, VOCAB)[0]
    assert not engine.has_work


def test_the_host_books_and_plans_while_a_step_runs() -> None:
    """At no time but the first and the last is the device without work."""
    engine, runner = make_engine()
    for number in range(3):
        engine.submit(make_request(f"r{number}", prompt=[number] * 9, max_tokens=20))
    in_flight = []
    while engine.has_work:
        engine.step()
        launches = sum(call == "launch" for call, _ in runner.calls)
        in_flight.append(launches - (len(runner.calls) - launches))
    assert set(in_flight[:-1]) == {1}
    assert in_flight[-1] == 0


def test_a_token_that_is_waited_for_makes_the_engine_read_before_it_launches() -> None:
    engine, runner = make_engine()
    sampling = SamplingParams(presence_penalty=1.0)
    run_to_end(engine, [make_request(max_tokens=3, sampling=sampling)])
    assert runner.calls == [(call, n) for n in range(3) for call in ("launch", "read")]


def stopping_request() -> tuple[Answers, frozenset[int]]:
    whole = slow_answer(make_request(max_tokens=9), VOCAB)[0]
    number = next(n for n in range(1, 9) if whole[n] not in whole[:n])
    return {"r": (whole[: number + 1], "stop")}, frozenset([whole[number]])


def test_after_a_stop_token_there_is_work_until_the_surplus_step_is_read() -> None:
    engine, runner = make_engine()
    wanted, stops = stopping_request()
    engine.submit(make_request(max_tokens=9, stops=stops))
    answers: Answers = {}
    while answers != wanted:
        step_into(answers, engine)
    assert (engine.has_work, engine.free_slots, engine.free_tokens) == (True, 4, 128)
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert engine.step() == []
    assert not engine.has_work
    assert engine.step() == []
    assert runner.num_launches == len(runner.plans) == len(wanted["r"][0]) + 1


def test_a_request_that_comes_while_the_surplus_step_runs_is_launched_behind_it() -> None:
    engine, runner = make_engine()
    wanted, stops = stopping_request()
    engine.submit(make_request(max_tokens=9, stops=stops))
    answers: Answers = {}
    while answers != wanted:
        step_into(answers, engine)
    late = make_request("late", max_tokens=3)
    assert run_to_end(engine, [late]) == {"late": slow_answer(late, VOCAB)}
    number = len(wanted["r"][0])
    assert ("read", number) == runner.calls[runner.calls.index(("launch", number + 1)) + 1]


def test_after_the_abort_of_all_what_runs_is_read_and_dropped() -> None:
    engine, runner = make_engine()
    engine.submit(make_request("a", max_tokens=9))
    engine.step()
    assert engine.abort("a")
    assert (engine.has_work, engine.free_tokens, engine.free_slots) == (True, 128, 4)
    assert engine.step() == []
    assert runner.calls[-1] == ("read", 1)
    assert not engine.has_work


def test_a_deadline_that_passes_while_a_step_runs_ends_its_request_with_the_next() -> None:
    now = [0.0]
    engine, _ = make_engine(lambda: now[0])
    late = make_request("late", max_tokens=20, deadline=5.0)
    other = make_request("other", prompt=(2,), max_tokens=9)
    answers: Answers = {}
    for request in (late, other):
        engine.submit(request)
    step_into(answers, engine)
    now[0] = 5.0
    step_into(answers, engine)
    assert answers["late"] == (slow_answer(late, VOCAB)[0][:1], "deadline")
    while engine.has_work:
        step_into(answers, engine)
    assert answers["other"] == slow_answer(other, VOCAB)


@pytest.mark.parametrize("at", ["launch", "read"])
def test_after_a_failure_neither_step_counts_and_the_tokens_come_all_the_same(at: str) -> None:
    engine, runner = make_engine()
    request = make_request(prompt=range(7), max_tokens=9)
    engine.submit(request)
    answers: Answers = {}
    step_into(answers, engine)
    runner.failures, runner.failing_reads = (1, 0) if at == "launch" else (0, 1)
    with pytest.raises(RuntimeError, match="the fake device is lost"):
        engine.step()
    assert (engine.num_running, engine.has_work) == (1, True)
    before = len(runner.calls)
    step_into(answers, engine)
    assert [call for call, _ in runner.calls[before:]] == ["launch", "launch", "read"]
    while engine.has_work:
        step_into(answers, engine)
    assert answers == {"r": slow_answer(request, VOCAB)}
    assert engine.num_preemptions == 0


def test_after_a_failure_all_can_be_aborted_and_nothing_is_left() -> None:
    engine, runner = make_engine()
    engine.submit(make_request("a", max_tokens=9))
    engine.step()
    runner.failing_reads = 1
    with pytest.raises(RuntimeError):
        engine.step()
    assert engine.abort("a")
    assert (engine.has_work, engine.free_tokens) == (False, 128)


@pytest.mark.parametrize("seed", range(40))
def test_a_device_that_fails_at_random_changes_no_answer(seed: int) -> None:
    rng = random.Random(seed)
    engine, runner = make_engine(num_blocks=14)
    runner.poison = {11} if seed % 2 else ()
    requests = [
        make_request(
            f"r{number}",
            prompt=[rng.randrange(rng.choice([2, VOCAB])) for _ in range(rng.randrange(1, 14))],
            max_tokens=rng.randrange(1, 20),
            stops=rng.sample(range(VOCAB), rng.randrange(2)),
            sampling=SamplingParams(seed=number, frequency_penalty=rng.choice([0.0, 0.0, 0.3])),
        )
        for number in range(10)
    ]
    for request in requests:
        engine.submit(request)
    answers: Answers = {}
    num_failures = 0
    while engine.has_work:
        runner.failures = int(rng.random() < 0.2)
        runner.failing_reads = int(rng.random() < 0.2)
        try:
            step_into(answers, engine)
        except RuntimeError:
            num_failures += 1
    assert num_failures > 1
    assert answers == {r.request_id: slow_answer(r, VOCAB, runner.poison) for r in requests}
    assert engine.free_tokens == 14 * 4
