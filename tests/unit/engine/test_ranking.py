"""Ranks against a stable sort of the whole row."""

import math

import pytest
import torch
from torch import Tensor

from mixfleet_engine.ranking import BLOCK, argmax, block_maxima, rank

WIDTHS = [1, 63, 64, 65, 700, 64 * 80, 64 * 80 + 17]


def logits_of(kind: str, rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(rows, width, generator=generator) * 4
    if kind == "ties":
        return normal.round()
    if kind == "bf16":
        return normal.bfloat16().float()
    if kind == "signed zeros":
        return normal.sign() * 0.0
    if kind == "one spike":
        return torch.zeros(rows, width).index_fill_(1, torch.tensor([width // 2]), 9.0)
    if kind == "last is best":
        normal[:, -1] = 99.0
        return normal
    if kind == "mostly -inf":
        return normal.masked_fill(normal < 8, -math.inf)
    if kind == "huge":
        return normal * 1e37
    return normal


KINDS = [
    "normal", "ties", "bf16", "signed zeros", "one spike", "last is best", "mostly -inf", "huge",
]  # fmt: skip


def full_order(logits: Tensor) -> Tensor:
    return logits.sort(dim=-1, descending=True, stable=True).indices


@pytest.mark.parametrize("width", WIDTHS)
def test_block_maxima_are_those_of_each_block(width: int) -> None:
    logits = logits_of("normal", 3, width)
    expected = torch.stack([block.amax(-1) for block in torch.split(logits, BLOCK, dim=-1)], dim=-1)
    assert torch.equal(block_maxima(logits), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_argmax_is_the_first_of_the_highest(kind: str, width: int) -> None:
    logits = logits_of(kind, 5, width)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert argmax(logits, block_maxima(logits)).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_all_ranks_are_a_stable_sort(kind: str, width: int) -> None:
    logits = logits_of(kind, 4, width)
    ranking = rank(logits, block_maxima(logits), num_ranks=10**9, num_blocks=10**9)
    assert torch.equal(ranking.token_ids, full_order(logits))
    assert ranking.num_sure.tolist() == [[width]] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64 * 80, 64 * 80 + 17])
@pytest.mark.parametrize(("num_ranks", "num_blocks"), [(1, 1), (20, 20), (64, 10), (500, 64)])
def test_sure_ranks_are_those_of_a_full_sort(
    kind: str, width: int, num_ranks: int, num_blocks: int
) -> None:
    logits = logits_of(kind, 6, width)
    ranking = rank(logits, block_maxima(logits), num_ranks=num_ranks, num_blocks=num_blocks)
    assert ranking.token_ids.shape == (6, num_ranks)
    sure = torch.arange(num_ranks) < ranking.num_sure
    expected = full_order(logits)[:, :num_ranks]
    assert torch.equal(ranking.token_ids[sure], expected[sure])
    assert (ranking.num_sure >= min(num_ranks, num_blocks)).all()


def test_ranks_beyond_the_looked_at_blocks_are_not_called_sure() -> None:
    logits = torch.zeros(1, 64 * 4)
    logits[0, [5, 70, 140]] = torch.tensor([3.0, 2.0, 1.0])
    ranking = rank(logits, block_maxima(logits), num_ranks=10, num_blocks=2)
    assert ranking.token_ids[0, :3].tolist() == [5, 70, 0]
    assert ranking.num_sure.item() == 2, "the third is 140, in a block that was not looked at"


@pytest.mark.parametrize("bits", [0x7FC00000, -1, -0x400000, 0x7F800000])
@pytest.mark.parametrize("last_broken", [64 * 19, WIDTHS[-1]])
def test_broken_rows_give_ids_within_the_vocabulary(bits: int, last_broken: int) -> None:
    """A NaN of either sign, one whose bits are all set, and infinity."""
    width = WIDTHS[-1]
    logits = torch.ones(1, width)
    logits.view(torch.int32)[:, :last_broken] = bits
    logits[:, -17:] = math.inf  # so that the last block, not a whole one, is looked into
    ranking = rank(logits, block_maxima(logits), num_ranks=500, num_blocks=20)
    assert ranking.token_ids.min() >= 0
    assert ranking.token_ids.max() < width
