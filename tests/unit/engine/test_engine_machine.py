"""Everything at once, in any order: what hypothesis can think of against the slow loop."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mixfleet_engine.engine import Engine
from mixfleet_engine.errors import RequestRejectedError
from mixfleet_engine.request import GenerateRequest, SamplingParams
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import StepPlan
from support.engine_requests import Answers, make_request, run_to_end, step_into
from support.fake_runner import FakeRunner, slow_answer

VOCAB = 12
POISON = VOCAB - 1
LARGE_VOCAB = 60
"""So large that the poisonous token, its last, is seldom sampled."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The scheduler's numbers, as one value that hypothesis can draw."""

    num_blocks: int
    block_size: int
    max_batch_size: int
    more_step_tokens: int
    context_length: int
    prefix_cache: bool


sizes_drawn = st.builds(
    Sizes,
    num_blocks=st.integers(1, 12),
    block_size=st.integers(1, 5),
    max_batch_size=st.integers(1, 5),
    more_step_tokens=st.sampled_from([0, 1, 3, 20]),
    context_length=st.integers(8, 40),
    prefix_cache=st.sampled_from([True, True, True, False]),
)
# Few different tokens, so that many prompts begin alike.
prompts_drawn = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=16),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
    st.integers(1, 16).map(lambda length: [n % 3 for n in range(length)]),
)


@st.composite
def request_drawn(draw: st.DrawFn) -> GenerateRequest:
    """A request without an id of its own, sometimes one that cannot fit."""
    return make_request(
        prompt=draw(prompts_drawn),
        max_tokens=draw(st.integers(1, 20)),
        stops=draw(st.frozensets(st.integers(0, VOCAB - 1), max_size=2)),
        sampling=SamplingParams(
            seed=draw(st.integers(0, 1)),
            presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.0, 0.5])),
        ),
        priority=draw(st.integers(0, 2)),
    )


class EngineMachine(RuleBasedStateMachine):
    """Arrivals, aborts, losses, failures, deadlines and NaNs in any order, in a cache of any size.

    The fake runner asserts that each chunk goes on after exactly the right tokens and that nobody
    writes to what another one reads; here the answers are compared with those of each request
    alone.
    """

    pipelined = False

    @initialize(sizes=sizes_drawn, has_poison=st.booleans())
    def start(self, sizes: Sizes, *, has_poison: bool) -> None:
        max_step_tokens = sizes.max_batch_size + sizes.more_step_tokens
        self.sizes = sizes
        self.runner = FakeRunner(
            num_blocks=sizes.num_blocks,
            block_size=sizes.block_size,
            vocab_size=VOCAB,
            max_batch_size=sizes.max_batch_size,
            max_step_tokens=max_step_tokens,
            poison={POISON} if has_poison else (),
            during_run=self.run,
        )
        scheduler = Scheduler(
            num_blocks=sizes.num_blocks,
            block_size=sizes.block_size,
            max_batch_size=sizes.max_batch_size,
            max_step_tokens=max_step_tokens,
            context_length=sizes.context_length,
            vocab_size=VOCAB,
            prefix_cache=sizes.prefix_cache,
        )
        self.now = 0.0
        self.engine = Engine(
            self.runner, scheduler, clock=lambda: self.now, pipelined=self.pipelined
        )
        self.live: dict[str, GenerateRequest] = {}
        self.untold: set[str] = set()
        """Overdue requests whose end a failed step has kept from us."""
        self.answers: Answers = {}
        self.abort_next: str | None = None
        self.num_submitted = 0
        self.num_steps = 0
        self.max_steps = 0

    def run(self, plan: StepPlan) -> None:
        # So slow that decodes and prefills together miss the target now and then.
        self.now += 0.015 * plan.num_tokens
        if self.abort_next is not None:
            self.forget(self.abort_next)
            self.abort_next = None

    def forget(self, request_id: str) -> None:
        assert self.engine.abort(request_id)
        del self.live[request_id]
        self.untold.discard(request_id)
        self.answers.pop(request_id, None)

    def submit_if_it_fits(self, request: GenerateRequest) -> None:
        num_tokens = len(request.prompt_token_ids) + request.max_tokens
        if num_tokens > self.engine.context_length:
            with pytest.raises(RequestRejectedError):
                self.engine.submit(request)
            return
        self.engine.submit(request)
        self.live[request.request_id] = request
        # The first in the order moves in every step; a better one may make it begin once more.
        # Pipelined, its end and the step before its beginning may be of no use to others.
        self.max_steps += num_tokens + self.engine.context_length + 2 * self.pipelined

    def overdue(self) -> set[str]:
        return {
            request_id
            for request_id, request in self.live.items()
            if request.deadline is not None and request.deadline <= self.now
        }

    @rule(request=request_drawn())
    def submit(self, request: GenerateRequest) -> None:
        self.num_submitted += 1
        self.submit_if_it_fits(replace(request, request_id=f"r{self.num_submitted}"))

    @rule(request=request_drawn(), left_s=st.floats(-0.1, 3.0))
    def submit_with_a_deadline(self, request: GenerateRequest, left_s: float) -> None:
        self.submit(replace(request, deadline=self.now + left_s))

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
        self.abort_next = None

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def lose_and_continue_under_the_same_id(self, data: st.DataObject) -> None:
        request = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        delivered, _ = self.answers.get(request.request_id, ((), None))
        self.forget(request.request_id)
        output = (*request.output_token_ids, *delivered)
        self.submit_if_it_fits(replace(request, output_token_ids=output))

    @precondition(lambda self: set(self.live) - self.overdue())
    @rule(reading=st.booleans())
    def fail(self, *, reading: bool) -> None:
        untold = self.untold | self.overdue()
        self.runner.failures, self.runner.failing_reads = (0, 1) if reading else (1, 0)
        # Who was two steps ahead may begin again.
        self.max_steps += self.pipelined * len(self.live) * self.engine.context_length
        if reading or not self.pipelined:
            with pytest.raises(RuntimeError):
                self.engine.step()
            self.untold = untold
            return
        # A step may have nothing to launch: then it reads.
        try:
            self.step()
        except RuntimeError:
            self.untold = untold
        self.runner.failures = 0

    @rule()
    def step(self) -> None:
        self.num_steps += self.engine.has_work
        overdue = self.overdue()
        step_into(self.answers, self.engine)
        self.untold.clear()
        for request_id, (token_ids, reason) in list(self.answers.items()):
            assert reason == "deadline" or request_id not in overdue
            if reason is not None:
                request = self.live.pop(request_id)
                self.check_end(request, token_ids, reason)
                del self.answers[request_id]

    def check_end(self, request: GenerateRequest, token_ids: tuple[int, ...], reason: str) -> None:
        wanted, wanted_reason = slow_answer(request, VOCAB, self.runner.poison)
        if reason == "deadline":
            assert request.deadline is not None
            assert request.deadline <= self.now
            assert token_ids == wanted[: len(token_ids)]
        else:
            assert (token_ids, reason) == (wanted, wanted_reason)

    @rule()
    def some_steps(self) -> None:
        for _ in range(5):
            self.step()

    @rule(seconds=st.floats(0.0, 1.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_numbers_at_the_door_are_right(self) -> None:
        if not hasattr(self, "engine"):
            return
        num_inside = len(set(self.live) - self.untold)
        free = self.engine.free_tokens
        assert 0 <= free <= self.sizes.num_blocks * self.sizes.block_size
        assert self.engine.free_slots == max(0, self.sizes.max_batch_size - num_inside)
        assert self.engine.num_running + self.engine.num_waiting == num_inside
        assert self.engine.has_work >= bool(self.live)
        assert self.pipelined or self.engine.has_work == bool(self.live)
        assert self.engine.prefix_hit_tokens <= self.engine.prefix_queried_tokens

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.live:
            self.step()
            assert self.num_steps <= self.max_steps, "somebody starves"
        if self.pipelined and self.engine.has_work:
            assert self.engine.step() == [], "all were told of their ends"
        assert not self.engine.has_work
        assert self.engine.free_tokens == self.sizes.num_blocks * self.sizes.block_size
        if (length := self.engine.context_length - 1) > 0:
            self.runner.poison = ()
            last = make_request("last", prompt=[n % VOCAB for n in range(length)], max_tokens=1)
            assert run_to_end(self.engine, [last])["last"] == slow_answer(last, VOCAB)


class PipelinedEngineMachine(EngineMachine):
    """The same with each step launched before the tokens of the one before are read."""

    pipelined = True


EXAMPLES = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestEngineMachine = pytest.mark.slow(EngineMachine.TestCase)
TestEngineMachine.settings = EXAMPLES
TestPipelinedEngineMachine = pytest.mark.slow(PipelinedEngineMachine.TestCase)
TestPipelinedEngineMachine.settings = EXAMPLES


def crowd(rng: random.Random) -> Iterator[GenerateRequest]:
    """Requests of which many begin alike and some have a token that gives no finite numbers."""
    beginnings = [[rng.randrange(LARGE_VOCAB) for _ in range(24)] for _ in range(2)]
    for number in range(16):
        prompt = rng.choice(beginnings)[: rng.randrange(1, 25)]
        prompt += [rng.randrange(LARGE_VOCAB) for _ in range(rng.randrange(4))]
        if rng.random() < 0.15:
            prompt[rng.randrange(len(prompt))] = LARGE_VOCAB - 1
        yield make_request(
            f"r{number}",
            prompt=prompt,
            max_tokens=rng.randrange(1, 9),
            priority=rng.randrange(2),
        )


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("first_seed", range(0, 200, 25))
def test_a_crowd_in_a_cache_that_is_too_small_gets_its_answers(
    first_seed: int, *, pipelined: bool
) -> None:
    for seed in range(first_seed, first_seed + 25):
        rng = random.Random(seed)
        num_blocks, block_size, max_batch_size = rng.randrange(9, 16), 4, rng.randrange(1, 6)
        max_step_tokens = max_batch_size + rng.randrange(20)
        runner = FakeRunner(
            num_blocks=num_blocks,
            block_size=block_size,
            vocab_size=LARGE_VOCAB,
            max_batch_size=max_batch_size,
            max_step_tokens=max_step_tokens,
            poison={LARGE_VOCAB - 1},
        )
        scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_batch_size=max_batch_size,
            max_step_tokens=max_step_tokens,
            context_length=36,
            vocab_size=LARGE_VOCAB,
        )
        engine = Engine(runner, scheduler, clock=lambda: 0.0, pipelined=pipelined)
        wanted = {}
        answers: Answers = {}
        for request in crowd(rng):
            engine.submit(request)
            wanted[request.request_id] = slow_answer(request, LARGE_VOCAB, runner.poison)
            for _ in range(rng.randrange(4)):
                step_into(answers, engine)
            if rng.random() < 0.2 and engine.abort(request.request_id):
                del wanted[request.request_id]
                answers.pop(request.request_id, None)
            if rng.random() < 0.1 and engine.has_work:
                runner.failing_reads = 1
                with pytest.raises(RuntimeError):
                    engine.step()
        while engine.has_work:
            step_into(answers, engine)
        assert answers == wanted
        assert engine.free_tokens == num_blocks * block_size
