"""The whole loop: a machine with a known cost per step, a clock that it moves, long prompts."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from mixfleet_engine.engine import Engine
from mixfleet_engine.pacing import StepLoad
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import SampledToken, StepPlan
from support.engine_requests import make_request

TARGET_S = 0.1
BATCH = 8
NUM_PROMPTS = 8

Cost = Callable[[StepLoad], float]


def linear(load: StepLoad) -> float:
    """Seconds of a step on a machine just as the model supposes."""
    return (
        0.02 + 1e-3 * load.num_decodes + 3e-4 * load.num_prefill_tokens + 1e-7 * load.num_attended
    )


def experts(load: StepLoad) -> float:
    """Seconds on one whose few decodes leave most experts alone, which no line describes."""
    share_of_experts = 1 - 0.75**load.num_tokens
    return 0.01 + 0.04 * share_of_experts + 2e-4 * load.num_tokens + 1e-7 * load.num_attended


def tiled(load: StepLoad) -> float:
    """Seconds on one that computes tokens by the 32."""
    return 0.015 + 0.012 * math.ceil(load.num_tokens / 32) + 1e-7 * load.num_attended


@dataclass(kw_only=True)
class TimedRunner:
    """Takes the time that ``cost`` says, more or less, and always samples the same token."""

    num_blocks: int = 4096
    block_size: int = 16
    cost: Cost
    noise: float = 0.0
    """Standard deviation of the logarithm of a step's time."""
    hiccups: float = 0.0
    """Share of steps that take 10 times as long."""
    now: float = 0.0
    free_at: float = 0.0
    """When the device has done all that was launched."""
    plans: list[StepPlan] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    def launch(self, plan: StepPlan) -> "TimedLaunch":
        assert all(chunk.token_ids for chunk in plan.chunks)
        self.plans.append(plan)
        elapsed_s = self.cost(StepLoad.of(plan)) * math.exp(self.rng.gauss(0, self.noise))
        elapsed_s *= 10 if self.rng.random() < self.hiccups else 1
        self.free_at = max(self.now, self.free_at) + elapsed_s
        return TimedLaunch(self, self.free_at, plan.num_samples)


@dataclass(frozen=True)
class TimedLaunch:
    """A step that is done at its time."""

    runner: TimedRunner
    done_at: float
    num_samples: int

    def read(self) -> list[SampledToken]:
        self.runner.now = max(self.runner.now, self.done_at)
        return [SampledToken(1)] * self.num_samples


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run took."""

    share_in_time: float
    """Of the gaps between two tokens of an answer, those of at most 1.3 times the target."""
    prompt_tokens_per_s: float


def make_engine(
    runner: TimedRunner, *, max_step_tokens: int, itl_target_s: float, pipelined: bool = False
) -> Engine:
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_batch_size=BATCH,
        max_step_tokens=max_step_tokens,
        context_length=16_384,
        vocab_size=10_000,
        itl_target_s=itl_target_s,
    )
    return Engine(runner, scheduler, clock=lambda: runner.now, pipelined=pipelined)


def measure(
    runner: TimedRunner,
    *,
    max_step_tokens: int,
    itl_target_s: float,
    pipelined: bool = False,
    host_s: float = 0.0,
) -> Measured:
    """Write six long answers and serve prompts of 2000 tokens beside them, until those end.

    Between two steps the host takes ``host_s`` for other things.
    """
    engine = make_engine(
        runner, max_step_tokens=max_step_tokens, itl_target_s=itl_target_s, pipelined=pipelined
    )
    times: dict[str, list[float]] = {}
    for number in range(6):
        engine.submit(make_request(f"chat {number}", prompt=[number] * 20, max_tokens=8000))
    for number in range(NUM_PROMPTS):
        prompt = [(number * 1000 + n) % 10_000 for n in range(2000)]
        engine.submit(make_request(f"long {number}", prompt=prompt, max_tokens=10))
    while any(len(times.get(f"long {number}", ())) < 10 for number in range(NUM_PROMPTS)):
        for output in engine.step():
            times.setdefault(output.request_id, []).append(runner.now)
        runner.now += host_s
    gaps = [b - a for moments in times.values() for a, b in pairwise(moments)]
    in_time = sum(gap <= 1.3 * TARGET_S for gap in gaps)
    return Measured(
        share_in_time=in_time / len(gaps), prompt_tokens_per_s=NUM_PROMPTS * 2000 / runner.now
    )


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize(("noise", "hiccups"), [(0.0, 0.0), (0.05, 0.01), (0.2, 0.02)])
@pytest.mark.parametrize("cost", [linear, experts, tiled])
def test_answers_keep_their_pace_and_prompts_go_nearly_as_fast_as_with_the_best_fixed_chunk(
    cost: Cost, noise: float, hiccups: float, *, pipelined: bool
) -> None:
    def machine() -> TimedRunner:
        return TimedRunner(cost=cost, noise=noise, hiccups=hiccups)

    paced = measure(machine(), max_step_tokens=512, itl_target_s=TARGET_S, pipelined=pipelined)
    assert paced.share_in_time >= 0.95
    fixed = [
        measure(machine(), max_step_tokens=chunk + BATCH, itl_target_s=math.inf)
        for chunk in (32, 64, 96, 128, 192, 256, 384)
    ]
    in_time = [run for run in fixed if run.share_in_time >= 0.95]
    assert 0 < len(in_time) < len(fixed), "the target should rule out some sizes, not all"
    best = max(run.prompt_tokens_per_s for run in in_time)
    assert paced.prompt_tokens_per_s >= 0.8 * best


def test_what_the_host_does_meanwhile_costs_a_pipelined_engine_nothing() -> None:
    busy = measure(
        TimedRunner(cost=linear),
        max_step_tokens=512,
        itl_target_s=TARGET_S,
        pipelined=True,
        host_s=0.015,
    )
    idle = measure(
        TimedRunner(cost=linear), max_step_tokens=512, itl_target_s=TARGET_S, pipelined=True
    )
    assert busy.share_in_time >= 0.95
    assert busy.prompt_tokens_per_s >= 0.98 * idle.prompt_tokens_per_s


def test_without_a_target_answers_wait_for_whole_chunks() -> None:
    run = measure(TimedRunner(cost=linear), max_step_tokens=512, itl_target_s=math.inf)
    assert run.share_in_time < 0.7


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_machine_that_gets_twice_as_slow_is_noticed(*, pipelined: bool) -> None:
    slowed = TimedRunner(cost=linear, noise=0.05)
    slowed.cost = lambda load: linear(load) * (1 if slowed.now < 4 else 2)
    run = measure(slowed, max_step_tokens=512, itl_target_s=TARGET_S, pipelined=pipelined)
    assert slowed.now > 10
    assert run.share_in_time >= 0.95


def test_a_prompt_of_which_not_one_token_fits_takes_no_part_in_the_step() -> None:
    runner = TimedRunner(cost=lambda load: 0.01 + 1e-5 * load.num_attended)
    engine = make_engine(runner, max_step_tokens=512, itl_target_s=TARGET_S)
    engine.submit(make_request("chat", max_tokens=8000))
    engine.submit(make_request("deep", prompt=[n % 10_000 for n in range(15_000)]))
    while runner.plans[-1:] == [] or runner.plans[-1].chunks[-1].start < 12_000:
        engine.step()
    engine.submit(make_request("better", prompt=[7] * 20, priority=-1))
    engine.step()
    assert [chunk.request_id for chunk in runner.plans[-1].chunks] == ["chat", "better"]
