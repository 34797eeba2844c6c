"""Random tokens of what top-k, top-p and min-p leave.

Shape letters: R rows, V vocabulary, N ranks, best first.
"""

import math
from typing import Final

import torch
from torch import Tensor

from mixfleet_engine.ranking import rank
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampling_rows import SamplingRows
from mixfleet_engine.token_draw import draw, token_weights, total_weight

UNSURE: Final = -2
"""In place of a token: more ranks must be looked at."""

_EVERY = 1 << 62
EFFORTS: Final = ((64, 64), (512, 256), (4096, _EVERY), (_EVERY, _EVERY))
"""Ranks and blocks that are looked at. A few tokens hold nearly all of the mass nearly always;
the last one is a full sort, which leaves nothing unsure and takes milliseconds a row."""


def is_filtered(params: SamplingParams) -> bool:
    """Whether any token is taken out."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def draw_filtered(rows: SamplingRows, effort: int = 0) -> Tensor:
    """Return ``[R]`` token ids, ``UNSURE`` where this effort does not tell.

    What is told does not hang on the effort.

    Args:
        rows: Rows with a temperature.
        effort: Index into ``EFFORTS``.
    """
    num_ranks, num_blocks = EFFORTS[effort]
    ranking = rank(rows.logits, rows.maxima, num_ranks=num_ranks, num_blocks=num_blocks)
    best, temperatures = rows.best, rows.temperatures()
    logits = rows.logits.gather(1, ranking.token_ids)
    weights = token_weights(logits, best, temperatures)  # [R, N]
    kept = _kept(rows, (logits - best).div_(temperatures), weights)
    num_kept = kept.sum(-1, keepdim=True).clamp_min_(1)
    # In order of the ids, not of the ranks: two tokens that change places by a last bit of their
    # logits then leave the draw alone.
    token_ids, order = ranking.token_ids.sort(dim=-1)
    drawn = draw((weights * kept).gather(1, order), rows.uniforms())
    found = token_ids.gather(1, drawn[:, None])
    return found.masked_fill_(~_is_sure(rows, num_kept, ranking.num_sure), UNSURE)[:, 0]


def _kept(rows: SamplingRows, scaled: Tensor, weights: Tensor) -> Tensor:
    """Return the mask ``[R, N]`` of what is left: the first ranks of each row.

    Args:
        rows: The rows.
        scaled: ``[R, N]`` logits over temperature, the best at 0.
        weights: ``[R, N]``.
    """
    width, device = weights.shape[-1], weights.device
    top_k = _top_k(rows)
    kept = torch.arange(width, device=device) < top_k
    if any(p.top_p < 1 for p in rows.params):
        top_p = rows.column([p.top_p for p in rows.params], torch.float64)
        mass = (weights.double() * kept).cumsum(-1)
        # A token stays if the better ones alone fall short of the wanted share.
        kept &= mass - weights < top_p * _total(rows, mass)
    if any(p.min_p > 0 for p in rows.params):
        lowest = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in rows.params]
        kept &= scaled >= rows.column(lowest, torch.float64)
    kept[:, 0] = True  # also where a share is so small that it rounds to nothing
    return kept


def _total(rows: SamplingRows, mass: Tensor) -> Tensor:
    """Return ``[R, 1]`` what top-p takes its share of: the weights that top-k left, else all."""
    total = mass[:, -1:]
    everything = [r for r, p in enumerate(rows.params) if not 0 < p.top_k < rows.vocab_size]
    if not everything:
        return total
    chosen = rows.select(everything)
    sums = total_weight(token_weights(chosen.logits, chosen.best, chosen.temperatures()))
    return total.index_copy(0, torch.tensor(everything, device=mass.device), sums)


def _top_k(rows: SamplingRows) -> Tensor:
    """Return ``[R, 1]`` from 1 to V."""
    every = rows.vocab_size
    return rows.column([min(p.top_k or every, every) for p in rows.params], torch.int64)


def _is_sure(rows: SamplingRows, num_kept: Tensor, num_sure: Tensor) -> Tensor:
    """Return the mask ``[R, 1]`` of rows that more ranks would not change."""
    top_k = _top_k(rows)
    shares = [p.top_p < 1 and 0 < p.top_k < rows.vocab_size for p in rows.params]
    # Where top-p takes its share of what top-k leaves, all of that must be there.
    needs_all = rows.column(shares, torch.bool)
    return (top_k <= num_sure) | (~needs_all & (num_kept < num_sure))
