"""Cuts against a walk along a stable sort, in whole numbers."""

import pytest
import torch
from torch import Tensor

from mixfleet_engine.cut import cut
from mixfleet_engine.token_draw import token_weights, total_weight


def slow_cut(logits: Tensor, weights: Tensor, wanted: float) -> list[bool]:
    """One row's mask."""
    order = logits.sort(descending=True, stable=True).indices.tolist()
    kept, mass = [False] * len(order), 0
    for token in order:
        if mass >= wanted:
            break
        kept[token] = True
        mass += int(weights[token])
    return kept


def logits_of(kind: str, rows: int, width: int) -> Tensor:
    normal = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    return {
        "normal": normal,
        "low bits": 1 + normal * 1e-6,
        "ties": (normal * 2).round(),
        "all equal": torch.full((rows, width), -3.0),
        "signed zeros": normal.sign() * 0.0,
        "both signs": normal.sign() * (normal.abs() + 1e-30),
    }[kind]


KINDS = ["normal", "low bits", "ties", "all equal", "signed zeros", "both signs"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 64, 65, 3000])
def test_cuts_by_mass_are_those_of_a_walk(kind: str, width: int) -> None:
    logits = logits_of(kind, 7, width)
    weights = token_weights(logits, logits.amax(-1, keepdim=True), torch.full((7, 1), 0.8))
    shares = torch.tensor([1e-9, 0.1, 0.5, 0.5, 0.9, 0.999999, 1.0], dtype=torch.float64)
    wanted = shares[:, None] * total_weight(weights)
    expected = [slow_cut(logits[r], weights[r], wanted[r].item()) for r in range(7)]
    assert cut(logits, weights, wanted).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_by_number_keep_just_so_many(kind: str) -> None:
    logits = logits_of(kind, 5, 700)
    ones = torch.ones_like(logits)
    wanted = torch.tensor([[1.0], [2.0], [300.0], [699.0], [700.0]], dtype=torch.float64)
    kept = cut(logits, ones, wanted)
    assert kept.sum(-1).tolist() == wanted[:, 0].tolist()
    assert kept.tolist() == [slow_cut(logits[r], ones[r], wanted[r].item()) for r in range(5)]


def test_tokens_without_weight_do_not_count_at_a_tie() -> None:
    """As after another cut that took some of the equals out."""
    weights = torch.tensor([[4.0, 4.0, 4.0, 0.0, 0.0]])
    kept = cut(torch.zeros(1, 5), weights, torch.tensor([[8.0]], dtype=torch.float64))
    assert (weights * kept).tolist() == [[4.0, 4.0, 0.0, 0.0, 0.0]]


def test_a_sum_that_is_reached_just_so_takes_no_more() -> None:
    weights = torch.full((1, 100), 2.0**35)
    wanted = torch.tensor([[2.0**35 * 70]], dtype=torch.float64)
    assert cut(torch.zeros(1, 100), weights, wanted).sum().item() == 70
    assert cut(torch.zeros(1, 100), weights, wanted + 1).sum().item() == 71


def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    logits = logits_of("normal", 9, 5000)
    weights = token_weights(logits, logits.amax(-1, keepdim=True), torch.ones(9, 1))
    wanted = total_weight(weights) * 0.8
    together = cut(logits, weights, wanted)
    for row in range(9):
        one = slice(row, row + 1)
        assert torch.equal(cut(logits[one], weights[one], wanted[one]), together[one])
