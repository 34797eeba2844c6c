from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.engine import Engine
from mixfleet_engine.errors import ConfigError, RequestRejectedError
from mixfleet_engine.request import GenerateRequest, SamplingParams
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import StepPlan
from support.engine_requests import Answers, make_request, run_to_end, step_into
from support.fake_runner import FakeRunner, slow_answer

VOCAB = 12
"""So small that stop tokens come up often."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The scheduler's numbers, as one value that hypothesis can draw."""

    num_blocks: int = 32
    block_size: int = 4
    max_batch_size: int = 4
    max_step_tokens: int = 16
    context_length: int = 64
    prefix_cache: bool = True
    pipelined: bool = False


def make_engine(
    sizes: Sizes, clock: Callable[[], float] = lambda: 0.0
) -> tuple[Engine, FakeRunner]:
    runner = FakeRunner(
        num_blocks=sizes.num_blocks,
        block_size=sizes.block_size,
        vocab_size=VOCAB,
        max_batch_size=sizes.max_batch_size,
        max_step_tokens=sizes.max_step_tokens,
    )
    scheduler = Scheduler(
        num_blocks=sizes.num_blocks,
        block_size=sizes.block_size,
        max_batch_size=sizes.max_batch_size,
        max_step_tokens=sizes.max_step_tokens,
        context_length=sizes.context_length,
        vocab_size=VOCAB,
        prefix_cache=sizes.prefix_cache,
    )
    return Engine(runner, scheduler, clock=clock, pipelined=sizes.pipelined), runner


both = pytest.mark.parametrize("pipelined", [False, True])


def slow_answers(requests: list[GenerateRequest]) -> Answers:
    return {request.request_id: slow_answer(request, VOCAB) for request in requests}


def mixed_requests() -> list[GenerateRequest]:
    """Short and long, seeded and greedy, stopping and not, new and continued."""
    return [
        make_request("plain", prompt=(1, 2, 3), max_tokens=9),
        make_request("long", prompt=[n % VOCAB for n in range(40)], max_tokens=7),
        make_request("stops", prompt=(5,), max_tokens=30, stops=(0, 3)),
        make_request("seeded", prompt=(5,), max_tokens=8, sampling=SamplingParams(seed=9)),
        make_request("continued", prompt=(5, 6), output=(7, 8, 9), max_tokens=12),
        make_request("one", prompt=(1,), max_tokens=1),
    ]


def test_the_engine_fits_its_door() -> None:
    engine, _ = make_engine(Sizes())
    door: GenerationEngine = engine
    assert (door.context_length, door.free_slots, door.free_tokens) == (64, 4, 128)
    assert not door.has_work


@pytest.mark.parametrize("name", ["num_blocks", "block_size"])
def test_a_runner_with_another_cache_is_refused(name: str) -> None:
    _, runner = make_engine(Sizes())
    setattr(runner, name, 3)
    sizes = {"num_blocks": 32, "block_size": 4}
    scheduler = Scheduler(
        num_blocks=sizes["num_blocks"],
        block_size=sizes["block_size"],
        max_batch_size=4,
        max_step_tokens=16,
        context_length=64,
        vocab_size=VOCAB,
    )
    with pytest.raises(ConfigError, match=f"{name}={sizes[name]}: the runner has 3"):
        Engine(runner, scheduler)


@both
def test_a_step_without_work_does_not_run_the_model(*, pipelined: bool) -> None:
    engine, runner = make_engine(Sizes(pipelined=pipelined))
    assert engine.step() == []
    assert runner.plans == []


@both
def test_the_only_request_gets_its_whole_answer(*, pipelined: bool) -> None:
    engine, runner = make_engine(Sizes(pipelined=pipelined))
    request = make_request(max_tokens=5)
    assert run_to_end(engine, [request]) == slow_answers([request])
    assert len(runner.plans) == 5


@both
def test_a_batch_gets_the_same_answers_as_each_request_alone(*, pipelined: bool) -> None:
    engine, _ = make_engine(Sizes(pipelined=pipelined))
    assert run_to_end(engine, mixed_requests()) == slow_answers(mixed_requests())
    assert engine.free_tokens == 128


@both
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("max_step_tokens", [1, 2, 3, 7, 64])
def test_neither_chunk_size_nor_order_change_an_answer(
    max_step_tokens: int, *, reverse: bool, pipelined: bool
) -> None:
    sizes = Sizes(
        max_step_tokens=max_step_tokens, max_batch_size=min(4, max_step_tokens), pipelined=pipelined
    )
    engine, _ = make_engine(sizes)
    requests = mixed_requests()
    assert run_to_end(engine, requests[::-1] if reverse else requests) == slow_answers(requests)


@both
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_preemption_changes_no_answer(*, prefix_cache: bool, pipelined: bool) -> None:
    engine, runner = make_engine(
        Sizes(num_blocks=12, prefix_cache=prefix_cache, pipelined=pipelined)
    )
    requests = [make_request(name, prompt=(n,), max_tokens=40) for n, name in enumerate("abcd")]
    assert run_to_end(engine, requests) == slow_answers(requests)
    assert engine.num_preemptions > 0
    restarts = sum(chunk.start == 0 for plan in runner.plans for chunk in plan.chunks)
    if prefix_cache:
        assert restarts <= len(requests) + engine.num_preemptions
        assert engine.prefix_hit_tokens > 0
    else:
        assert restarts == len(requests) + engine.num_preemptions
        assert engine.prefix_hit_tokens == 0


@both
@pytest.mark.parametrize("max_step_tokens", [4, 7, 64])
def test_a_prefix_that_was_found_changes_no_answer(
    max_step_tokens: int, *, pipelined: bool
) -> None:
    engine, _ = make_engine(Sizes(max_step_tokens=max_step_tokens, pipelined=pipelined))
    system = [n % VOCAB for n in range(13)]
    requests = [make_request(f"r{n}", prompt=[*system, n], max_tokens=9) for n in range(8)]
    assert run_to_end(engine, requests) == slow_answers(requests)
    assert engine.prefix_hit_tokens > 0
    assert engine.prefix_queried_tokens == sum(len(r.prompt_token_ids) for r in requests)


@both
def test_a_conversation_that_goes_on_finds_its_last_turn(*, pipelined: bool) -> None:
    engine, runner = make_engine(Sizes(pipelined=pipelined))
    first = make_request("first", prompt=range(7), max_tokens=6)
    ((answer, _),) = run_to_end(engine, [first]).values()
    second = make_request("second", prompt=[*range(7), *answer, 3, 4], max_tokens=5)
    assert run_to_end(engine, [second]) == slow_answers([second])
    # The last token of the answer was never computed, the full blocks before it were.
    assert next(c for c in runner.plans[6].chunks).start == 12


@both
def test_numbers_without_end_hurt_only_who_has_them(*, pipelined: bool) -> None:
    engine, runner = make_engine(Sizes(num_blocks=8, pipelined=pipelined))
    runner.poison = {11}
    shared = [1, 2, 3, 4, 11, 6, 7, 8]
    broken = [make_request(f"broken {n}", prompt=[*shared, n], max_tokens=9) for n in range(2)]
    sound = [make_request(f"sound {n}", prompt=[5, n], max_tokens=9) for n in range(6)]
    answers = run_to_end(engine, [*broken, *sound])
    assert answers == {
        request.request_id: slow_answer(request, VOCAB, {11}) for request in (*broken, *sound)
    }
    assert engine.free_tokens == 32


def test_an_overdue_request_ends_with_the_next_step_and_the_others_go_on() -> None:
    now = [0.0]
    engine, runner = make_engine(Sizes(), clock=lambda: now[0])
    late = make_request("late", prompt=(1,), max_tokens=20, deadline=5.0)
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
    assert len(runner.plans) == 9


@both
def test_nothing_is_run_when_only_overdue_requests_are_left(*, pipelined: bool) -> None:
    engine, runner = make_engine(Sizes(pipelined=pipelined), clock=lambda: 7.0)
    engine.submit(make_request("late", deadline=5.0))
    (output,) = engine.step()
    assert (output.request_id, output.finish_reason) == ("late", "deadline")
    assert (runner.plans, engine.has_work, engine.free_slots) == ([], False, 4)


@both
def test_the_engine_tells_who_runs_and_who_waits(*, pipelined: bool) -> None:
    engine, _ = make_engine(Sizes(max_batch_size=2, pipelined=pipelined))
    for name in "abc":
        engine.submit(make_request(name))
    assert (engine.num_running, engine.num_waiting) == (0, 3)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 1)


def test_a_request_joins_while_others_decode() -> None:
    engine, runner = make_engine(Sizes())
    early = make_request("early", max_tokens=12)
    late = make_request("late", prompt=(4, 4), max_tokens=3)
    engine.submit(early)
    answers: Answers = {}
    for _ in range(4):
        step_into(answers, engine)
    engine.submit(late)
    step_into(answers, engine)
    assert [chunk.request_id for chunk in runner.plans[-1].chunks] == ["early", "late"]
    assert set(answers) == {"early", "late"}
    assert answers["early"][1] is None


@pytest.mark.parametrize("num_delivered", range(1, 9))
def test_a_continued_answer_is_the_rest_of_the_whole_one(num_delivered: int) -> None:
    sampling = SamplingParams(temperature=1.0, seed=3)
    whole = make_request(max_tokens=9, sampling=sampling)
    ((token_ids, _),) = run_to_end(make_engine(Sizes())[0], [whole]).values()
    rest = make_request(output=token_ids[:num_delivered], max_tokens=9, sampling=sampling)
    answers = run_to_end(make_engine(Sizes())[0], [rest])
    assert answers == {"r": (token_ids[num_delivered:], "length")}


@both
def test_an_abort_hurts_nobody_else(*, pipelined: bool) -> None:
    engine, _ = make_engine(Sizes(pipelined=pipelined))
    requests = mixed_requests()
    for request in requests:
        engine.submit(request)
    answers: Answers = {}
    step_into(answers, engine)
    assert engine.abort("plain")
    assert not engine.abort("plain")
    while engine.has_work:
        step_into(answers, engine)
    wanted = slow_answers(requests)
    del wanted["plain"], answers["plain"]
    assert answers == wanted
    assert engine.free_tokens == 128


@both
def test_an_abort_within_the_run_drops_its_token_only(*, pipelined: bool) -> None:
    engine, runner = make_engine(Sizes(pipelined=pipelined))
    for name in "ab":
        engine.submit(make_request(name))

    def abort_a(_: StepPlan) -> None:
        assert engine.abort("a")

    runner.during_run = abort_a
    assert [output.request_id for output in engine.step()] == ["b"]
    assert engine.free_tokens == 124


def test_after_a_failed_run_the_same_step_can_be_tried_again() -> None:
    engine, runner = make_engine(Sizes(max_step_tokens=5))
    requests = mixed_requests()
    for request in requests:
        engine.submit(request)
    answers: Answers = {}
    for number in range(500):
        runner.failures = number % 3
        while runner.failures:
            with pytest.raises(RuntimeError, match="the fake device is lost"):
                engine.step()
        step_into(answers, engine)
        if not engine.has_work:
            break
    assert answers == slow_answers(requests)
    assert engine.free_tokens == 128


@both
def test_after_a_failed_run_some_requests_can_be_aborted_and_the_others_go_on(
    *, pipelined: bool
) -> None:
    engine, runner = make_engine(Sizes(pipelined=pipelined))
    requests = mixed_requests()
    for request in requests:
        engine.submit(request)
    runner.failures = 1
    with pytest.raises(RuntimeError):
        engine.step()
    for request in requests[:3]:
        assert engine.abort(request.request_id)
    assert run_to_end(engine) == slow_answers(requests[3:])


@both
def test_after_a_failed_run_all_can_be_aborted_and_new_ones_come(*, pipelined: bool) -> None:
    engine, runner = make_engine(Sizes(pipelined=pipelined))
    engine.submit(make_request("old"))
    engine.step()
    runner.failures = 1
    with pytest.raises(RuntimeError):
        engine.step()
    assert engine.abort("old")
    assert (engine.has_work, engine.free_tokens, engine.free_slots) == (False, 128, 4)
    request = make_request("new", max_tokens=6)
    assert run_to_end(engine, [request]) == slow_answers([request])


@both
def test_a_rejected_request_hurts_nobody(*, pipelined: bool) -> None:
    engine, _ = make_engine(Sizes(pipelined=pipelined))
    good = make_request("good")
    engine.submit(good)
    for bad in (make_request("good"), make_request("long", max_tokens=999)):
        with pytest.raises(RequestRejectedError):
            engine.submit(bad)
    assert run_to_end(engine) == slow_answers([good])


sizes_drawn = st.builds(
    lambda num_blocks, block_size, max_batch_size, extra, context_length, prefix_cache: Sizes(
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_size=max_batch_size,
        max_step_tokens=max_batch_size + extra,
        context_length=context_length,
        prefix_cache=prefix_cache,
    ),
    num_blocks=st.integers(1, 10),
    block_size=st.integers(1, 5),
    max_batch_size=st.integers(1, 5),
    extra=st.sampled_from([0, 1, 3, 20]),
    context_length=st.integers(2, 40),
    prefix_cache=st.booleans(),
)
tokens_drawn = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    st.lists(st.integers(0, 1), min_size=1, max_size=20),  # of which many begin alike
)


@st.composite
def request_drawn(draw: st.DrawFn) -> GenerateRequest:
    """A request without an id of its own, sometimes one that cannot fit."""
    return make_request(
        prompt=draw(tokens_drawn),
        max_tokens=draw(st.integers(1, 20)),
        stops=draw(st.frozensets(st.integers(0, VOCAB - 1), max_size=2)),
        sampling=SamplingParams(seed=draw(st.integers(0, 3))),
        priority=draw(st.integers(-1, 1)),
    )


@both
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(sizes=sizes_drawn, drawn=st.lists(request_drawn(), max_size=8))
def test_every_answer_is_that_of_the_slow_loop_within_a_bounded_number_of_steps(
    sizes: Sizes, drawn: list[GenerateRequest], *, pipelined: bool
) -> None:
    engine, _ = make_engine(replace(sizes, pipelined=pipelined))
    accepted = []
    for number, request in enumerate(drawn):
        request = replace(request, request_id=f"r{number}")
        fits = len(request.prompt_token_ids) + request.max_tokens <= engine.context_length
        if fits:
            engine.submit(request)
            accepted.append(request)
        else:
            with pytest.raises(RequestRejectedError):
                engine.submit(request)
    # The first in the order moves by at least one token in every step.
    bound = sum(len(r.prompt_token_ids) + r.max_tokens for r in accepted)
    assert run_to_end(engine, max_steps=bound + 1) == slow_answers(accepted)
    assert engine.free_tokens == sizes.num_blocks * sizes.block_size
