"""Where top-k and top-p cut a row of any shape, without a sort.

The first tokens, best first, whose weights reach a wanted sum end at some token. Its logit is found
digit by digit: weights are summed up by the upper half of the logit's bits, then by the lower half
within the upper half at which the sum is reached, and at last by the id among equal logits. Sums of
whole numbers are exact in any order, so this is what a walk along a full sort would find.

Shape letters: R rows, V vocabulary.
"""

from typing import Final

import torch
from torch import Tensor

from mixfleet_engine.ranking import ordered_bits
from mixfleet_engine.token_draw import reach

_DIGIT_BITS: Final = 16
_HALF: Final = 1 << (_DIGIT_BITS - 1)
_SLICE: Final = 2
"""Rows that are looked at together on a CPU, so that their sums stay in its caches."""


def cut(logits: Tensor, weights: Tensor, wanted: Tensor) -> Tensor:
    """Return the mask ``[R, V]`` of tokens, best first, up to the one that reaches ``wanted``.

    Ties go to the lower id. It is the same as taking a token as long as the better ones alone fall
    short.

    Args:
        logits: ``[R, V]`` fp32, which give the order.
        weights: ``[R, V]`` whole numbers, fp32.
        wanted: ``[R, 1]`` fp64, above 0 and at most the sum of the row's weights.
    """
    if logits.device.type != "cpu" or len(logits) <= _SLICE:
        return _cut(logits, weights, wanted)
    slices = [torch.split(tensor, _SLICE) for tensor in (logits, weights, wanted)]
    return torch.cat([_cut(*rows) for rows in zip(*slices, strict=True)])


def _cut(logits: Tensor, weights: Tensor, wanted: Tensor) -> Tensor:
    falling = ordered_bits(logits).bitwise_not_()  # so that the best tokens come first
    left = weights.double()  # of tokens that may be the last kept one
    before = torch.zeros_like(wanted)
    digits = (falling >> _DIGIT_BITS).add_(_HALF)
    upper, before = reach(_sums(digits, left), wanted, before)
    left *= digits == upper.int()
    digits = falling & (2 * _HALF - 1)
    lower, before = reach(_sums(digits, left), wanted, before)
    edge = ((upper - _HALF << _DIGIT_BITS) + lower).int()  # [R, 1] the last kept one's
    ties = falling == edge
    left *= ties
    last, _ = reach(left, wanted, before)
    token_ids = torch.arange(logits.shape[-1], device=logits.device)
    return (falling < edge).logical_or_(ties.logical_and_(token_ids <= last))


def _sums(digits: Tensor, weights: Tensor) -> Tensor:
    """Return ``[R, 2**16]`` sums of fp64 ``weights`` by digit, both ``[R, V]``."""
    sums = weights.new_zeros(len(weights), 2 * _HALF)
    return sums.scatter_add_(1, digits.long(), weights)
