import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixfleet_engine.pacing import StepBudget, StepLoad, StepTimeModel
from support.plans import chunk, plan, table


def linear(load: StepLoad) -> float:
    return (
        0.02 + 1e-3 * load.num_decodes + 3e-4 * load.num_prefill_tokens + 1e-7 * load.num_attended
    )


def loads(number: int, seed: int = 1) -> list[StepLoad]:
    """Steps of all kinds."""
    rng = random.Random(seed)
    made = []
    for _ in range(number):
        load = StepLoad()
        for _ in range(rng.randrange(9)):
            load = load.with_decode(rng.randrange(4000))
        if rng.random() < 0.5 or load.num_decodes == 0:
            load = load.with_prefill(rng.randrange(4000), rng.randrange(2, 400))
        made.append(load)
    return made


def taught(
    number: int = 200, cost: Callable[[StepLoad], float] = linear, noise: float = 0.0
) -> StepTimeModel:
    model = StepTimeModel()
    rng = random.Random(2)
    for load in loads(number):
        model.learn(load, cost(load) * math.exp(rng.gauss(0, noise)))
    return model


def worst_error(model: StepTimeModel, cost: Callable[[StepLoad], float] = linear) -> float:
    """Largest share by which a prediction is off."""
    return max(abs(model.predict(load) / cost(load) - 1) for load in loads(50, seed=3))


def test_the_load_of_a_plan_counts_what_each_token_looks_at() -> None:
    made = plan(
        chunk([5], start=9, block_table=table(10, 4)),
        chunk([6], start=0, block_table=[7]),
        chunk([1, 2, 3], start=4, block_table=[8, 9]),
    )
    # 10 and 1 for the single tokens, then 5 + 6 + 7.
    assert StepLoad.of(made) == StepLoad(num_decodes=2, num_prefill_tokens=3, num_attended=29)


@given(start=st.integers(0, 50), num_tokens=st.integers(0, 50))
@settings(deadline=None, derandomize=True, database=None)
def test_a_prefill_looks_at_as_much_as_its_tokens_one_by_one(start: int, num_tokens: int) -> None:
    load = StepLoad().with_prefill(start, num_tokens)
    assert load.num_attended == sum(start + n + 1 for n in range(num_tokens))


def test_a_linear_machine_is_learnt_exactly() -> None:
    assert worst_error(taught(400)) < 0.02


@pytest.mark.parametrize("first_s", [0.5, 5.0, 60.0])
def test_a_slow_first_step_says_nothing_of_the_others(first_s: float) -> None:
    model = StepTimeModel()
    steps = loads(120)
    seen: set[bool] = set()
    for load in steps:
        prefills = load.num_prefill_tokens > 0
        model.learn(load, linear(load) if prefills in seen else first_s)
        seen.add(prefills)
    assert worst_error(model) < 0.1


def test_a_machine_that_stalled_for_some_steps_is_soon_itself_again() -> None:
    model = taught(100)
    for load in loads(4, seed=4):
        model.learn(load, 3600.0)
    for load in loads(40, seed=5):
        model.learn(load, linear(load))
    assert worst_error(model) < 0.2


def test_noise_is_averaged_out() -> None:
    assert worst_error(taught(400, noise=0.1)) < 0.15


@pytest.mark.parametrize("at", [0, 1, 5, 100, 299])
def test_one_step_ten_times_too_long_spoils_nothing(at: int) -> None:
    model = StepTimeModel()
    for number, load in enumerate(loads(300)):
        model.learn(load, linear(load) * (10 if number == at else 1))
    assert worst_error(model) < 0.1


def test_a_machine_that_has_changed_is_learnt_anew() -> None:
    def slower(load: StepLoad) -> float:
        return 3 * linear(load)

    model = taught(300)
    for load in loads(300, seed=9):
        model.learn(load, slower(load))
    assert worst_error(model, slower) < 0.15


def test_what_is_known_of_prefills_outlives_a_long_time_without_any() -> None:
    model = taught(200)
    load = StepLoad().with_decode(100).with_decode(900)
    for _ in range(3000):
        model.learn(load, linear(load))
    prefill = load.with_prefill(500, 200)
    assert model.predict(prefill) == pytest.approx(linear(prefill), rel=0.1)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 512), st.integers(0, 8000), st.floats(0, 10)),
        max_size=60,
    )
)
def test_whatever_was_measured_a_larger_step_is_never_predicted_shorter(
    steps: list[tuple[int, int, int, float]],
) -> None:
    model = StepTimeModel()
    for num_decodes, num_prefill_tokens, start, elapsed_s in steps:
        load = StepLoad().with_prefill(start, num_prefill_tokens)
        for _ in range(num_decodes):
            load = load.with_decode(start)
        model.learn(load, elapsed_s)
    predictions = [model.predict(StepLoad().with_prefill(100, n)) for n in range(0, 500, 50)]
    assert predictions == sorted(predictions)
    assert predictions[0] >= 0
    assert math.isfinite(predictions[-1])
    # Nothing that was measured was longer, so no prediction should be wild.
    if steps:
        longest = max(elapsed_s for *_, elapsed_s in steps)
        seen = StepLoad().with_prefill(steps[-1][2], steps[-1][1])
        assert model.predict(seen) <= 30 * longest + 1e-6


@pytest.mark.parametrize("target_s", [0.01, 0.05, 0.1, 0.3, 10.0])
@pytest.mark.parametrize("start", [0, 3000])
def test_the_chunk_within_a_target_is_the_largest_one(target_s: float, start: int) -> None:
    model = taught()
    load = StepLoad().with_decode(50)
    slow = max(
        (n for n in range(513) if model.predict(load.with_prefill(start, n)) <= target_s),
        default=0,
    )
    found = model.prefill_tokens_within(target_s, load, start=start, limit=512)
    assert found == slow


def make_budget(
    model: StepTimeModel, *, num_decodes: int = 1, target_s: float = 0.1, max_tokens: int = 512
) -> StepBudget:
    load = StepLoad()
    for _ in range(num_decodes):
        load = load.with_decode(10)
    return StepBudget(model, load, max_tokens=max_tokens, floor=16, target_s=target_s)


def test_without_decodes_a_step_is_filled_up() -> None:
    budget = make_budget(taught(), num_decodes=0, target_s=0.001)
    assert budget.take(start=0, num_pending=300) == 300
    assert budget.is_open
    assert budget.take(start=0, num_pending=300) == 212
    assert not budget.is_open


def test_before_anything_was_learnt_a_chunk_beside_decodes_is_cautious() -> None:
    budget = make_budget(StepTimeModel())
    assert budget.take(start=0, num_pending=100) == 100
    assert budget.take(start=0, num_pending=1000) == 28
    assert not budget.is_open


def test_beside_decodes_the_target_bounds_all_chunks_together() -> None:
    model = taught()
    budget = make_budget(model)
    first = budget.take(start=0, num_pending=100)
    second = budget.take(start=0, num_pending=1000)
    assert first == 100
    load = StepLoad().with_decode(10).with_prefill(0, first).with_prefill(0, second)
    aim_s = 0.1 - model.usual_error_s
    assert model.predict(load) <= aim_s < model.predict(load.with_prefill(second, 2))
    assert 0.09 < aim_s < 0.1


def test_the_noisier_the_machine_the_smaller_the_chunk() -> None:
    sizes = [
        make_budget(taught(300, noise=noise)).take(start=0, num_pending=512)
        for noise in (0.0, 0.1, 0.3)
    ]
    assert sizes[0] > sizes[1] > sizes[2] >= 16


def test_a_target_that_cannot_be_kept_leaves_the_floor() -> None:
    budget = make_budget(taught(), target_s=0.001)
    assert budget.take(start=0, num_pending=10) == 10
    assert budget.is_open
    assert budget.take(start=4000, num_pending=1000) == 6
    assert not budget.is_open


def test_a_full_step_takes_nothing_not_even_the_floor() -> None:
    budget = make_budget(taught(), num_decodes=8, target_s=0.001, max_tokens=10)
    assert budget.take(start=0, num_pending=100) == 2
    assert not budget.is_open
    assert not make_budget(taught(), num_decodes=8, max_tokens=8).is_open


def test_without_a_target_only_the_step_bounds_a_chunk() -> None:
    budget = make_budget(StepTimeModel(), target_s=math.inf)
    assert budget.take(start=0, num_pending=1000) == 511
