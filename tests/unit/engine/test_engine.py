from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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


def make_engine(sizes: Sizes) -> tuple[Engine, FakeRunner]:
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
    )
    return Engine(runner, scheduler), runner


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
        **sizes, max_batch_size=4, max_step_tokens=16, context_length=64, vocab_size=VOCAB
    )
    with pytest.raises(ConfigError, match=f"{name}={sizes[name]}: the runner has 3"):
        Engine(runner, scheduler)


def test_a_step_without_work_does_not_run_the_model() -> None:
    engine, runner = make_engine(Sizes())
    assert engine.step() == []
    assert runner.plans == []


def test_the_only_request_gets_its_whole_answer() -> None:
    engine, runner = make_engine(Sizes())
    request = make_request(max_tokens=5)
    assert run_to_end(engine, [request]) == slow_answers([request])
    assert len(runner.plans) == 5


def test_a_batch_gets_the_same_answers_as_each_request_alone() -> None:
    engine, _ = make_engine(Sizes())
    assert run_to_end(engine, mixed_requests()) == slow_answers(mixed_requests())
    assert engine.free_tokens == 128


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("max_step_tokens", [1, 2, 3, 7, 64])
def test_neither_chunk_size_nor_order_change_an_answer(
    max_step_tokens: int, *, reverse: bool
) -> None:
    sizes = Sizes(max_step_tokens=max_step_tokens, max_batch_size=min(4, max_step_tokens))
    engine, _ = make_engine(sizes)
    requests = mixed_requests()
    assert run_to_end(engine, requests[::-1] if reverse else requests) == slow_answers(requests)


def test_preemption_changes_no_answer() -> None:
    engine, runner = make_engine(Sizes(num_blocks=12))
    requests = [make_request(name, prompt=(n,), max_tokens=40) for n, name in enumerate("abcd")]
    assert run_to_end(engine, requests) == slow_answers(requests)
    assert engine.num_preemptions > 0
    restarts = sum(chunk.start == 0 for plan in runner.plans for chunk in plan.chunks)
    assert restarts == len(requests) + engine.num_preemptions


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


def test_an_abort_hurts_nobody_else() -> None:
    engine, _ = make_engine(Sizes())
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


def test_an_abort_within_the_run_drops_its_token_only() -> None:
    engine, runner = make_engine(Sizes())
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


def test_after_a_failed_run_some_requests_can_be_aborted_and_the_others_go_on() -> None:
    engine, runner = make_engine(Sizes())
    requests = mixed_requests()
    for request in requests:
        engine.submit(request)
    runner.failures = 1
    with pytest.raises(RuntimeError):
        engine.step()
    for request in requests[:3]:
        assert engine.abort(request.request_id)
    assert run_to_end(engine) == slow_answers(requests[3:])


def test_after_a_failed_run_all_can_be_aborted_and_new_ones_come() -> None:
    engine, runner = make_engine(Sizes())
    engine.submit(make_request("old"))
    engine.step()
    runner.failures = 1
    with pytest.raises(RuntimeError):
        engine.step()
    assert engine.abort("old")
    assert (engine.has_work, engine.free_tokens, engine.free_slots) == (False, 128, 4)
    request = make_request("new", max_tokens=6)
    assert run_to_end(engine, [request]) == slow_answers([request])


def test_a_rejected_request_hurts_nobody() -> None:
    engine, _ = make_engine(Sizes())
    good = make_request("good")
    engine.submit(good)
    for bad in (make_request("good"), make_request("long", max_tokens=999)):
        with pytest.raises(RequestRejectedError):
            engine.submit(bad)
    assert run_to_end(engine) == slow_answers([good])


sizes_drawn = st.builds(
    lambda num_blocks, block_size, max_batch_size, extra, context_length: Sizes(
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch_size=max_batch_size,
        max_step_tokens=max_batch_size + extra,
        context_length=context_length,
    ),
    num_blocks=st.integers(1, 10),
    block_size=st.integers(1, 5),
    max_batch_size=st.integers(1, 5),
    extra=st.sampled_from([0, 1, 3, 20]),
    context_length=st.integers(2, 40),
)
tokens_drawn = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


@st.composite
def request_drawn(draw: st.DrawFn) -> GenerateRequest:
    """A request without an id of its own, sometimes one that cannot fit."""
    return make_request(
        prompt=draw(tokens_drawn),
        max_tokens=draw(st.integers(1, 20)),
        stops=draw(st.frozensets(st.integers(0, VOCAB - 1), max_size=2)),
        sampling=SamplingParams(seed=draw(st.integers(0, 3))),
    )


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(sizes=sizes_drawn, drawn=st.lists(request_drawn(), max_size=8))
def test_every_answer_is_that_of_the_slow_loop_within_a_bounded_number_of_steps(
    sizes: Sizes, drawn: list[GenerateRequest]
) -> None:
    engine, _ = make_engine(sizes)
    accepted = []
    for number, request in enumerate(drawn):
        request = rename(request, f"r{number}")
        fits = len(request.prompt_token_ids) + request.max_tokens <= engine.context_length
        if fits:
            engine.submit(request)
            accepted.append(request)
        else:
            with pytest.raises(RequestRejectedError):
                engine.submit(request)
    # The oldest request moves by at least one token in every step.
    bound = sum(len(r.prompt_token_ids) + r.max_tokens for r in accepted)
    assert run_to_end(engine, max_steps=bound + 1) == slow_answers(accepted)
    assert engine.free_tokens == sizes.num_blocks * sizes.block_size


def rename(request: GenerateRequest, request_id: str) -> GenerateRequest:
    return make_request(
        request_id,
        prompt=request.prompt_token_ids,
        output=request.output_token_ids,
        max_tokens=request.max_tokens,
        stops=request.stop_token_ids,
        sampling=request.sampling,
    )


class EngineMachine(RuleBasedStateMachine):
    """Arrivals, aborts, losses and failures in any order, in a cache of any size.

    The fake runner asserts that no block is owned twice and that each chunk goes on where the
    cache ends; here the answers are compared with those of each request alone.
    """

    @initialize(sizes=sizes_drawn)
    def start(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.engine, self.runner = make_engine(sizes)
        self.live: dict[str, GenerateRequest] = {}
        self.answers: Answers = {}
        self.abort_next: str | None = None
        self.runner.during_run = self.abort_in_run
        self.num_submitted = 0
        self.num_steps = 0
        self.max_steps = 0

    def abort_in_run(self, _: StepPlan) -> None:
        if self.abort_next is not None:
            self.forget(self.abort_next)
            self.abort_next = None

    def forget(self, request_id: str) -> None:
        assert self.engine.abort(request_id)
        del self.live[request_id]
        self.answers.pop(request_id, None)

    def submit_if_it_fits(self, request: GenerateRequest) -> None:
        num_tokens = len(request.prompt_token_ids) + request.max_tokens
        if num_tokens > self.engine.context_length:
            with pytest.raises(RequestRejectedError):
                self.engine.submit(request)
            return
        self.engine.submit(request)
        self.live[request.request_id] = request
        self.max_steps += num_tokens

    @rule(request=request_drawn())
    def submit(self, request: GenerateRequest) -> None:
        self.num_submitted += 1
        self.submit_if_it_fits(rename(request, f"r{self.num_submitted}"))

    @precondition(lambda self: self.live)
    @rule()
    def submit_the_same_again(self) -> None:
        with pytest.raises(RequestRejectedError):
            self.engine.submit(next(iter(self.live.values())))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.forget(data.draw(st.sampled_from(sorted(self.live))))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort_within_the_next_run(self, data: st.DataObject) -> None:
        self.abort_next = data.draw(st.sampled_from(sorted(self.live)))
        self.step()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def lose_and_continue_under_the_same_id(self, data: st.DataObject) -> None:
        request = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        delivered, _ = self.answers.get(request.request_id, ((), None))
        output = (*request.output_token_ids, *delivered)
        self.forget(request.request_id)
        self.submit_if_it_fits(
            make_request(
                request.request_id,
                prompt=request.prompt_token_ids,
                output=output,
                max_tokens=request.max_tokens,
                stops=request.stop_token_ids,
                sampling=request.sampling,
            )
        )

    @precondition(lambda self: self.live)
    @rule()
    def fail(self) -> None:
        before = self.engine.free_slots
        self.runner.failures = 1
        with pytest.raises(RuntimeError):
            self.engine.step()
        assert self.engine.free_slots == before

    @rule()
    def step(self) -> None:
        self.num_steps += self.engine.has_work
        step_into(self.answers, self.engine)
        for request_id, (token_ids, reason) in list(self.answers.items()):
            if reason is not None:
                request = self.live.pop(request_id)
                assert (token_ids, reason) == slow_answer(request, VOCAB)
                del self.answers[request_id]

    @rule()
    def some_steps(self) -> None:
        for _ in range(5):
            self.step()

    @invariant()
    def the_numbers_at_the_door_are_right(self) -> None:
        if not hasattr(self, "engine"):
            return
        free = self.engine.free_tokens
        assert 0 <= free <= self.sizes.num_blocks * self.sizes.block_size
        assert self.engine.free_slots == max(0, self.sizes.max_batch_size - len(self.live))
        assert self.engine.has_work == bool(self.live)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.live:
            self.step()
            assert self.num_steps <= self.max_steps, "somebody starves"
        assert not self.engine.has_work
        assert self.engine.free_tokens == self.sizes.num_blocks * self.sizes.block_size


TestEngineMachine = pytest.mark.slow(EngineMachine.TestCase)
TestEngineMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
