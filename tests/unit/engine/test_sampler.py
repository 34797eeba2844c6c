"""The vectorised sampler against a slow one that follows the words of the settings."""

import math
import random
from itertools import pairwise

import pytest
import torch

from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampler import sample, uniform
from mixfleet_engine.step import NO_TOKEN

GREEDY = SamplingParams()
VOCAB = 64


def random_logits(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def slow_sample(logits: list[float], params: SamplingParams, position: int) -> int:
    """Sort, cut, renormalise, walk: one token after the other."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.temperature == 0:
        return order[0]
    weight = {t: math.exp((logits[t] - logits[order[0]]) / params.temperature) for t in order}
    kept = order[: params.top_k] if params.top_k else order
    total = sum(weight[t] for t in kept)
    mass, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += weight[token] / total
        if mass >= params.top_p:
            break
    draw = uniform(params.seed, position) * sum(weight[t] for t in nucleus)
    for token in sorted(nucleus):
        draw -= weight[token]
        if draw < 0:
            return token
    raise AssertionError("the draw is below the total")


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.8, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 2, 5, 40, VOCAB, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.9, 0.5, 0.1]),
        seed=rng.getrandbits(64),
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_mix_of_settings_matches_the_slow_sampler(seed: int) -> None:
    rng = random.Random(seed)
    params = [random_params(rng) for _ in range(100)]
    positions = [rng.randrange(1000) for _ in params]
    logits = random_logits(len(params), seed)
    expected = [
        slow_sample(row, p, position)
        for row, p, position in zip(logits.tolist(), params, positions, strict=True)
    ]
    assert sample(logits, params, positions) == expected


def test_greedy_is_the_argmax_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [9, 5, 40]] = 2.0
    assert sample(logits, [GREEDY, GREEDY], [0, 0]) == [5, 0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1.0, top_p=0.0),
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=1e-300),
    ],
)
def test_settings_that_leave_one_token_are_greedy(params: SamplingParams) -> None:
    logits = random_logits(20)
    positions = list(range(20))
    assert sample(logits, [params] * 20, positions) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.6}])
def test_ties_at_the_edge_of_a_filter_go_to_the_lower_ids(settings: dict[str, float]) -> None:
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, [3, 20, 33, 60]] = 1.0
    seen = {
        sample(logits, [SamplingParams(temperature=1.0, seed=s, **settings)], [0])[0]  # type: ignore[arg-type]
        for s in range(100)
    }
    assert seen == {3, 20}


def test_top_p_is_taken_of_what_top_k_left() -> None:
    # 0.4, 0.3, 0.2, 0.1: of the best two, 4/7 is more than a half, so the first stands alone.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    both = [SamplingParams(temperature=1.0, top_k=2, top_p=0.5, seed=s) for s in range(50)]
    assert {sample(logits, [p], [0])[0] for p in both} == {0}
    only_p = [SamplingParams(temperature=1.0, top_p=0.5, seed=s) for s in range(50)]
    assert {sample(logits, [p], [0])[0] for p in only_p} == {0, 1}


def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    rng = random.Random(7)
    params = [random_params(rng) for _ in range(60)]
    logits, positions = random_logits(60), list(range(60))
    together = sample(logits, params, positions)
    alone = [sample(logits[i : i + 1], [params[i]], [positions[i]])[0] for i in range(len(params))]
    order = rng.sample(range(60), 60)
    shuffled = sample(logits[order], [params[i] for i in order], [positions[i] for i in order])
    assert alone == together
    assert [together[i] for i in order] == shuffled


def test_frequencies_follow_the_probabilities() -> None:
    logits = random_logits(1, spread=1.0)
    params = SamplingParams(temperature=0.7, seed=42)
    draws = 20_000
    tokens = sample(logits.expand(draws, -1), [params] * draws, list(range(draws)))
    counts = torch.tensor(tokens).bincount(minlength=VOCAB)
    expected = (logits[0] / 0.7).softmax(-1) * draws
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 103, "99.9 % of fair samplers stay below with 63 degrees of freedom"


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(3)
    before = logits.clone()
    sample(logits, [SamplingParams(temperature=1.0, top_k=3, top_p=0.5)] * 3, [0, 1, 2])
    assert torch.equal(logits, before)


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


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, top_p=0.9)])
def test_a_row_that_is_not_finite_gives_no_token_and_hurts_no_other(
    broken: float, params: SamplingParams
) -> None:
    logits = random_logits(3)
    expected = sample(logits, [params] * 3, [0, 1, 2])
    logits[1, 5] = broken
    assert sample(logits, [params] * 3, [0, 1, 2]) == [expected[0], NO_TOKEN, expected[2]]


def test_tokens_that_cannot_be_chosen_are_no_error() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, 7] = 1.0
    assert sample(logits, [SamplingParams(temperature=1.0)], [0]) == [7]
