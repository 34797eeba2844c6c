"""Draws against a walk in Python's whole numbers."""

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from mixfleet_engine.token_draw import draw, reach, token_weights, total_weight
from mixfleet_engine.uniform import uniform


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random_weights(rows: int, width: int, *, empty: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(rows, width, generator=generator) * 5
    weights = token_weights(logits, logits.amax(-1, keepdim=True), torch.ones(rows, 1))
    return weights * (torch.rand(rows, width, generator=generator) >= empty)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def slow_draw(weights: list[float], number: float) -> int:
    target = Fraction(number) * sum(int(w) for w in weights)
    running = 0
    for place, weight in enumerate(weights):
        running += int(weight)
        if running > target:
            return place
    raise AssertionError("the draw is below the total")


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 1000, 4096])
def test_draws_are_those_of_a_walk(width: int) -> None:
    weights = random_weights(20, width)
    weights[:, -1].clamp_min_(1)
    numbers = [uniform(7, row) for row in range(18)] + [0.0, 1 - 2.0**-52]
    expected = [slow_draw(row, u) for row, u in zip(weights.tolist(), numbers, strict=True)]
    assert draw(weights, column(numbers)).tolist() == expected


def test_the_ends_of_the_range_give_the_first_and_last_weight() -> None:
    weights = torch.zeros(2, 200)
    weights[:, [5, 100, 150]] = 2.0**35
    assert draw(weights, column([0.0, 1 - 2.0**-52])).tolist() == [5, 150]


def test_a_draw_on_an_edge_goes_to_the_upper_side() -> None:
    weights = torch.ones(4, 4)
    assert draw(weights, column([0.0, 0.25, 0.5, 0.75])).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("width", [1, 64, 65, 1000])
def test_a_sum_is_reached_at_the_column_of_a_walk(width: int) -> None:
    weights = random_weights(20, width)
    weights[:, 0].clamp_min_(1)
    start = column([float(row) for row in range(20)])
    wanted = start + (total_weight(weights) * column([(row + 1) / 20 for row in range(20)])).ceil()
    places, before = reach(weights, wanted, start)
    for row in range(20):
        place, running = (
            int(places[row]),
            float(row) + sum(weights[row, : int(places[row])].tolist()),
        )
        assert before[row].item() == running
        assert running < wanted[row].item() <= running + weights[row, place].item()


def test_columns_without_weight_change_nothing() -> None:
    """So that few candidates and a whole vocabulary, filtered, give the same token."""
    weights = random_weights(50, 3000, empty=0.99)
    weights[:, 17].clamp_min_(1)
    numbers = column([uniform(3, row) for row in range(50)])
    for row in range(50):
        held = weights[row].nonzero()[:, 0]
        few = draw(weights[row, held][None], numbers[row : row + 1])
        assert held[few] == draw(weights[row : row + 1], numbers[row : row + 1])


def test_weights_are_whole_numbers_in_proportion() -> None:
    logits = torch.tensor([[1.0, 0.0, -math.inf, 1.0, -200.0]])
    weights = token_weights(logits, torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    expected = [2.0**35, 2.0**35 * math.exp(-2), 0.0, 2.0**35, 0.0]
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(weights, weights.round())


def test_sums_are_exact_in_the_largest_vocabulary() -> None:
    weights = torch.full((1, 2**18), 2.0**35)
    weights[0, 0] -= 2**12
    assert int(total_weight(weights).item()) == 2**53 - 2**12


@pytest.mark.parametrize("width", [32000, 50257])
@pytest.mark.parametrize("rows", [2, 7, 32])
def test_weights_and_sums_of_a_row_do_not_depend_on_the_batch(
    rows: int, width: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(threads)
    logits = torch.randn(rows, width, generator=generator) * 3
    best = logits.amax(-1, keepdim=True)
    temperatures = torch.rand(rows, 1, generator=generator) + 0.5
    together = token_weights(logits, best, temperatures)
    totals = total_weight(together)
    for row in (0, rows // 2, rows - 1):
        one = slice(row, row + 1)
        alone = token_weights(logits[one], best[one], temperatures[one])
        assert torch.equal(alone, together[one])
        assert torch.equal(total_weight(alone), totals[one])
        # In the order of a sort, of few at a time: wherever a candidate stands.
        some = torch.randperm(width, generator=generator)[:777]
        few = token_weights(logits[one, some], best[one], temperatures[one])
        assert torch.equal(few, together[one, some])
        assert sum(int(w) for w in alone[0].tolist()) == int(totals[row].item())


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_row_draws_a_column_that_exists(broken: float) -> None:
    weights = torch.full((2, 130), broken)
    weights[1] = 1.0
    drawn = draw(weights, column([0.5, 0.5]))
    assert 0 <= drawn[0] < 130
    assert drawn[1] == 65
