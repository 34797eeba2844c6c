"""What grammars take out of the logits, before anything is chosen from them.

Shape letters: R rows, G rows with a grammar, V vocabulary, B bytes of a mask, 8 tokens in each.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mixfleet_engine.step import PlannedChunk


def masked(logits: Tensor, chunks: Sequence[PlannedChunk]) -> Tensor:
    """Return ``logits`` with -inf for each token that a row's grammar does not allow.

    The same tensor if no row has a grammar; rows without one keep their bits. What is no number
    stays none, so that a model whose numbers have gone wrong is still found out.

    Args:
        logits: ``[R, V]`` fp32; left as they are.
        chunks: R chunks that sample.
    """
    found = [(row, c.grammar, c.position) for row, c in enumerate(chunks) if c.grammar is not None]
    if not found:
        return logits
    rows = torch.tensor([row for row, _, _ in found], device=logits.device)
    masks = [torch.frombuffer(g.allowed(position), dtype=torch.uint8) for _, g, position in found]
    allowed = _unpacked(torch.stack(masks).to(logits.device), logits.shape[-1])
    # Added, not filled in: a NaN or +inf becomes a NaN where a filled row would hide it.
    penalty = torch.zeros_like(allowed, dtype=logits.dtype).masked_fill_(~allowed, -math.inf)
    return logits.clone().index_add_(0, rows, penalty)


def _unpacked(masks: Tensor, vocab_size: int) -> Tensor:
    """Return ``[G, vocab_size]`` booleans of the bits of ``[G, B]``, lowest first."""
    bits = (1 << torch.arange(8, device=masks.device)).to(torch.uint8)
    return (masks[:, :, None] & bits).flatten(1)[:, :vocab_size] != 0
