"""Random tokens of what top-k, top-p and min-p leave.

Shape letters: R rows, V vocabulary, N ranks, best first.
"""

import math
from typing import Final

import torch
from torch import Tensor

from mixfleet_engine.cut import cut
from mixfleet_engine.ranking import rank
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampling_rows import SamplingRows
from mixfleet_engine.token_draw import draw, token_weights, total_weight

UNSURE: Final = -2
"""In place of a token: the whole vocabulary must be looked at."""

NUM_RANKS: Final = 64
"""Ranks, and blocks, that are looked at first. They hold nearly all of the mass nearly always."""


def is_filtered(params: SamplingParams) -> bool:
    """Whether any token is taken out."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def draw_filtered(rows: SamplingRows) -> Tensor:
    """Return ``[R]`` token ids, ``UNSURE`` where the first ranks do not tell.

    What is told is what ``draw_wide`` tells.

    Args:
        rows: Rows with a temperature.
    """
    ranking = rank(rows.logits, rows.maxima, num_ranks=NUM_RANKS, num_blocks=NUM_RANKS)
    # In order of the ids, not of the ranks: two tokens that change places by a last bit of their
    # logits then leave the draw alone.
    kept, weights = _kept(rows, ranking.token_ids)
    num_kept = kept.sum(-1, keepdim=True)
    token_ids, order = ranking.token_ids.sort(dim=-1)
    drawn = draw((weights * kept).gather(1, order), rows.uniforms())
    found = token_ids.gather(1, drawn[:, None])
    return found.masked_fill_(~_is_sure(rows, num_kept, ranking.num_sure), UNSURE)[:, 0]


def draw_wide(rows: SamplingRows) -> Tensor:
    """Return ``[R]`` token ids by looking at the whole vocabulary.

    Args:
        rows: Rows with a temperature.
    """
    weights = kept_weights(
        rows.logits,
        rows.best,
        rows.temperatures(),
        top_k=_top_k(rows) if any(_is_cut(rows, p) for p in rows.params) else None,
        top_p=_top_p(rows) if any(p.top_p < 1 for p in rows.params) else None,
        lowest=_lowest(rows) if any(p.min_p > 0 for p in rows.params) else None,
    )
    return draw(weights, rows.uniforms())


def kept_weights(
    logits: Tensor,
    best: Tensor,
    temperatures: Tensor,
    *,
    top_k: Tensor | None,
    top_p: Tensor | None,
    lowest: Tensor | None,
) -> Tensor:
    """Return ``[R, V]`` weights of all tokens, 0 for those that the filters take out.

    Args:
        logits: ``[R, V]`` fp32.
        best: ``[R, 1]`` highest of each row.
        temperatures: ``[R, 1]`` fp32, above 0.
        top_k: ``[R, 1]`` from 1 to V; None: no row has the filter.
        top_p: ``[R, 1]`` fp64, 1 where a row has none; None: no row has it.
        lowest: ``[R, 1]`` fp64, as `lowest_kept` says; None: no row has a min-p.
    """
    weights = token_weights(logits, best, temperatures)
    if top_k is not None:
        weights *= cut(logits, torch.ones_like(weights), top_k.double())
    if top_p is not None:
        # At least the best token stays, also where the share is 0.
        weights *= cut(logits, weights, (top_p * total_weight(weights)).clamp_min_(1))
    if lowest is not None:
        weights *= (logits - best).div_(temperatures) >= lowest
    return weights


def lowest_kept(min_p: float) -> float:
    """Return the lowest logit that min-p leaves, over temperature, the best being 0."""
    return math.log(min_p) if min_p > 0 else -math.inf


def _kept(rows: SamplingRows, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of what is left, the first ranks of each row, and the weights.

    Args:
        rows: The rows.
        token_ids: ``[R, N]``, best first.
    """
    best, temperatures = rows.best, rows.temperatures()
    logits = rows.logits.gather(1, token_ids)
    kept = torch.arange(token_ids.shape[-1], device=logits.device) < _top_k(rows)
    shared = any(p.top_p < 1 and not _is_cut(rows, p) for p in rows.params)
    if shared:
        every_weight = token_weights(rows.logits, best, temperatures)
        weights = every_weight.gather(1, token_ids)
    else:
        weights = token_weights(logits, best, temperatures)
    if any(p.top_p < 1 for p in rows.params):
        mass = (weights * kept).cumsum(-1, dtype=torch.float64)
        total = mass[:, -1:]
        # What top-p takes its share of: the weights that top-k left, else all.
        if shared:
            is_cut = rows.column([_is_cut(rows, p) for p in rows.params], torch.bool)
            total = torch.where(is_cut, total, total_weight(every_weight))
        # A token stays if the better ones alone fall short of the wanted share.
        kept &= mass - weights < _top_p(rows) * total
    if any(p.min_p > 0 for p in rows.params):
        kept &= (logits - best).div_(temperatures) >= _lowest(rows)
    kept[:, 0] = True  # also where a share is so small that it rounds to nothing
    return kept, weights


def _is_cut(rows: SamplingRows, params: SamplingParams) -> bool:
    """Whether top-k takes any token out."""
    return 0 < params.top_k < rows.vocab_size


def _top_p(rows: SamplingRows) -> Tensor:
    return rows.column([p.top_p for p in rows.params], torch.float64)


def _lowest(rows: SamplingRows) -> Tensor:
    return rows.column([lowest_kept(p.min_p) for p in rows.params], torch.float64)


def _top_k(rows: SamplingRows) -> Tensor:
    """Return ``[R, 1]`` from 1 to V."""
    every = rows.vocab_size
    return rows.column([min(p.top_k or every, every) for p in rows.params], torch.int64)


def _is_sure(rows: SamplingRows, num_kept: Tensor, num_sure: Tensor) -> Tensor:
    """Return the mask ``[R, 1]`` of rows that more ranks would not change."""
    top_k = _top_k(rows)
    shares = [p.top_p < 1 and _is_cut(rows, p) for p in rows.params]
    # Where top-p takes its share of what top-k leaves, all of that must be there.
    needs_all = rows.column(shares, torch.bool)
    return (top_k <= num_sure) | (~needs_all & (num_kept < num_sure))
