from itertools import pairwise

import pytest

from mixfleet_engine.uniform import uniform


def test_uniform_numbers_stay_the_same_for_ever() -> None:
    """A worker of the next release goes on with the answers of this one."""
    assert uniform(0, 0) == 0.6524484863740321
    assert uniform(1, 0) == 0.36818951565166946
    assert uniform(2**64 - 1, 12345) == 0.1450707396536648


def test_uniform_takes_seeds_of_any_sign_by_their_64_bits() -> None:
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)


@pytest.mark.parametrize("by_seed", [True, False])
def test_uniform_numbers_of_neighbours_look_unrelated(by_seed: bool) -> None:
    count = 20_000
    numbers = [uniform(i, 5) if by_seed else uniform(5, i) for i in range(count)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == count
    assert sum(numbers) / count == pytest.approx(0.5, abs=0.01)
    following = sum(a * b for a, b in pairwise(numbers)) / count
    assert following == pytest.approx(0.25, abs=0.01)


def test_near_seeds_do_not_walk_through_the_same_numbers() -> None:
    numbers = {uniform(seed, position) for seed in range(100) for position in range(100)}
    assert len(numbers) == 100 * 100
