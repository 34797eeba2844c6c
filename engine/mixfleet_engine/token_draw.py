"""A random token by its weight, the same on any device and beside any neighbours.

Weights are whole numbers. A sum of floats hangs on the order of adding, which hangs on the shape
of the batch, the threads and the device; sums of whole numbers below 2**53 are exact in fp64 in
any order, so a row alone, a row among others, few candidates and the whole vocabulary all agree.

Shape letters: R rows, W weights of a row.
"""

import torch
from torch import Tensor

from mixfleet_engine.ranking import BLOCK

_ONE = 2.0**35
"""The weight of the most likely token. 2**18 of them, more than any vocabulary, are 2**53; tokens
of less than 2**-36 of its probability are never drawn."""


def token_weights(logits: Tensor, best: Tensor, temperatures: Tensor) -> Tensor:
    """Return ``[R, W]`` whole numbers, fp32, proportional to the probabilities.

    Args:
        logits: ``[R, W]``.
        best: ``[R, 1]`` highest of each row.
        temperatures: ``[R, 1]``, above 0.
    """
    # The best is taken off first: a tiny temperature then gives 0 and -inf, never inf - inf.
    # exp2 would be faster, but its result differs by where in the tensor a number stands.
    return (logits - best).div_(temperatures).exp_().mul_(_ONE).round_()


def total_weight(weights: Tensor) -> Tensor:
    """Return the sums ``[R, 1]``, exact."""
    return weights.sum(-1, keepdim=True, dtype=torch.float64)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return ``[R]`` columns: the first at which the running sum passes the draw.

    Args:
        weights: ``[R, W]`` whole numbers, fp32.
        uniforms: ``[R, 1]`` fp64 in [0, 1).
    """
    if weights.shape[-1] <= BLOCK:
        running = weights.cumsum(-1, dtype=torch.float64)
        place = torch.searchsorted(running, uniforms * running[:, -1:], right=True)
        return place[:, 0].clamp_max_(weights.shape[-1] - 1)
    sums = _block_sums(weights)
    running = sums.cumsum(-1)
    return _found(weights, sums, running, uniforms * running[:, -1:], right=True)[0][:, 0]


def reach(weights: Tensor, wanted: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns ``[R, 1]`` at which the running sum reaches a sum, and the sum before.

    Args:
        weights: ``[R, W]`` whole numbers.
        wanted: ``[R, 1]`` fp64.
        before: ``[R, 1]`` what the running sum starts from.
    """
    sums = _block_sums(weights)
    running = sums.cumsum(-1).add_(before)
    return _found(weights, sums, running, wanted, right=False)


def _found(
    weights: Tensor, sums: Tensor, running: Tensor, target: Tensor, *, right: bool
) -> tuple[Tensor, Tensor]:
    """Return where the running sum is first at the target or, if ``right``, above it.

    Block sums are run through first and one block after that, since a running sum over all of a
    row is slow.

    Args:
        weights: ``[R, W]``.
        sums: fp64, of each block of ``weights``.
        running: fp64, their running sum.
        target: ``[R, 1]`` fp64.
        right: Above the target, not at it.

    Returns:
        The column and the running sum before it, both ``[R, 1]``.
    """
    width = weights.shape[-1]
    # The clamps are for rows of NaN, which have no answer but must not end the step.
    block = torch.searchsorted(running, target, right=right).clamp_max_(sums.shape[-1] - 1)
    # Beyond the end the last weight comes again, where the sum has got to the target already.
    columns = (block * BLOCK + torch.arange(BLOCK, device=weights.device)).clamp_max_(width - 1)
    inside = weights.gather(1, columns).double()
    within = inside.cumsum(-1).add_(running.gather(1, block) - sums.gather(1, block))
    place = torch.searchsorted(within, target, right=right).clamp_max_(BLOCK - 1)
    column = (block * BLOCK + place).clamp_max_(width - 1)
    return column, within.gather(1, place) - inside.gather(1, place)


def _block_sums(weights: Tensor) -> Tensor:
    width = weights.shape[-1]
    num_whole = width // BLOCK
    whole = weights[:, : num_whole * BLOCK].view(len(weights), num_whole, BLOCK)
    sums = whole.sum(-1, dtype=torch.float64)
    if num_whole * BLOCK == width:
        return sums
    return torch.cat([sums, total_weight(weights[:, num_whole * BLOCK :])], dim=-1)
