"""Filters over few ranks and over everything against a full sort in whole numbers."""

import math
import random

import pytest
import torch
from torch import Tensor

from mixfleet_engine.filters import UNSURE, draw_filtered, draw_wide, is_filtered
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampling_rows import SamplingRows
from mixfleet_engine.token_draw import token_weights
from mixfleet_engine.uniform import uniform
from support.slow_sampler import slow_order

VOCAB = 64 * 260 + 5


def logits_of(kind: str, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, VOCAB, generator=generator)
    return {
        "peaked": normal * 5,
        "broad": normal,
        "flat": torch.zeros(rows, VOCAB),
        "nearly flat": normal * 1e-3,
        "heavy ties": normal.round(),
        "two levels": (normal > 1).float(),
        "bf16": (normal * 4).bfloat16().float(),
        "one spike": torch.zeros(rows, VOCAB).index_fill_(1, torch.tensor([4000]), 30.0),
        "few possible": normal.masked_fill(normal < 3.2, -math.inf),
        "huge": normal * 1e37,
        "tiny": normal * 1e-30,
    }[kind]


KINDS = [
    "peaked", "broad", "flat", "two levels", "bf16", "one spike", "few possible", "huge", "tiny",
]  # fmt: skip


def random_filter(rng: random.Random) -> SamplingParams:
    while True:
        params = SamplingParams(
            temperature=rng.choice([0.2, 0.7, 1.0, 1.5, 30.0, 1e-30, 1e30]),
            top_k=rng.choice([0, 0, 1, 2, 50, 63, 64, 65, 513, 5000, VOCAB, 10**6]),
            top_p=rng.choice([1.0, 1.0, 0.999999, 0.9, 0.5, 1e-3, 1e-12]),
            min_p=rng.choice([0.0, 0.0, 1e-30, 1e-6, 0.05, 0.5, 1.0]),
            seed=rng.getrandbits(64),
        )
        if is_filtered(params):
            return params


def exact_token(rows: SamplingRows, row: int) -> int:
    """By a full sort and whole numbers."""
    params = rows.params[row]
    best, temperature = rows.best[row : row + 1], rows.temperatures()[row : row + 1]
    logits = rows.logits[row : row + 1]
    weights = [int(w) for w in token_weights(logits, best, temperature)[0].tolist()]
    scaled = ((logits - best) / temperature)[0].tolist()
    order = slow_order(logits[0].tolist())[: params.top_k or VOCAB]
    wanted = params.top_p * sum(weights[t] for t in order)
    mass, kept = 0, list[int]()
    for token in order:
        if kept and (mass >= wanted and params.top_p < 1):
            break
        kept.append(token)
        mass += weights[token]
    if params.min_p > 0:
        kept = [t for t in kept if scaled[t] >= math.log(params.min_p)]
    target = uniform(params.seed, rows.positions[row]) * sum(weights[t] for t in kept)
    running = 0
    for token in sorted(kept):
        running += weights[token]
        if running > target:
            return token
    raise AssertionError("the draw is below the total")


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_token_of_a_full_sort(kind: str) -> None:
    rng = random.Random(kind)
    params = [random_filter(rng) for _ in range(16)]
    rows = SamplingRows.of(logits_of(kind, 16), params, list(range(16)))
    expected = [exact_token(rows, row) for row in range(16)]
    few = draw_filtered(rows).tolist()
    assert all(a in (b, UNSURE) for a, b in zip(few, expected, strict=True))
    assert draw_wide(rows).tolist() == expected


WIDE = [
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"top_p": 0.5, "min_p": 0.05},
    {"top_k": 4097},
    {"top_k": 9000, "top_p": 0.7},
    {"top_k": 12000, "top_p": 0.999999, "min_p": 1e-3},
    {"top_k": VOCAB - 1},
    {"top_p": 0.0},
]


@pytest.mark.parametrize("kind", ["broad", "nearly flat", "flat", "two levels", "heavy ties"])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_wide_rows_get_the_token_of_a_full_sort_in_any_batch(kind: str, num_rows: int) -> None:
    logits = logits_of(kind, 8)
    params = [
        SamplingParams(temperature=0.7, seed=seed, **settings)  # type: ignore[arg-type]
        for seed, settings in enumerate(WIDE)
    ]
    every = SamplingRows.of(logits, params, [9] * 8)
    expected = [exact_token(every, row) for row in range(8)]
    found = list[int]()
    for first in range(0, 8, num_rows):
        found += draw_wide(every.select(range(first, min(first + num_rows, 8)))).tolist()
    assert found == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=50),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.95, min_p=0.02),
        SamplingParams(temperature=1.0, min_p=0.05),
    ],
)
def test_usual_settings_are_sure_at_the_first_effort(params: SamplingParams) -> None:
    """A model's logits: a few tokens far above the rest."""
    logits = logits_of("broad", 8)
    logits[:, 100:5000:100] += torch.linspace(12, 3, 49)
    rows = SamplingRows.of(logits, [params] * 8, list(range(8)))
    assert UNSURE not in draw_filtered(rows).tolist()


def test_a_flat_row_is_told_only_where_its_ranks_suffice() -> None:
    params = [SamplingParams(temperature=1.0, top_k=k) for k in (63, 64, 65, VOCAB)]
    params[-1] = SamplingParams(temperature=1.0, top_p=0.99)
    rows = SamplingRows.of(logits_of("flat", 4), params, [0] * 4)
    unsure = [token == UNSURE for token in draw_filtered(rows).tolist()]
    assert unsure == [False, False, True, True]


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 3 / VOCAB - 1e-9}])
def test_ties_go_to_the_lower_ids(settings: dict[str, float]) -> None:
    params = [SamplingParams(temperature=1.0, seed=s, **settings) for s in range(60)]  # type: ignore[arg-type]
    rows = SamplingRows.of(logits_of("flat", 60), params, [0] * 60)
    assert set(draw_filtered(rows).tolist()) == {0, 1, 2}
    assert set(draw_wide(rows).tolist()) == {0, 1, 2}


def test_min_p_is_a_share_of_the_best_after_temperature() -> None:
    # 1, 0.5, 0.25 at temperature 1; at 2 the square roots: 1, 0.71, 0.5.
    logits = torch.full((40, VOCAB), -99.0)
    logits[:, 7:10] = torch.tensor([1.0, 0.5, 0.25]).log()
    for temperature, expected in ((1.0, {7, 8}), (2.0, {7, 8, 9})):
        params = [SamplingParams(temperature=temperature, min_p=0.49, seed=s) for s in range(40)]
        rows = SamplingRows.of(logits, params, [0] * 40)
        assert set(draw_filtered(rows).tolist()) == expected


@pytest.mark.parametrize(
    ("params", "filtered"),
    [
        (SamplingParams(temperature=1.0), False),
        (SamplingParams(temperature=1.0, top_k=1), True),
        (SamplingParams(temperature=1.0, top_p=0.99), True),
        (SamplingParams(temperature=1.0, min_p=0.01), True),
    ],
)
def test_only_settings_that_take_tokens_out_are_filters(
    params: SamplingParams, filtered: bool
) -> None:
    assert is_filtered(params) is filtered
