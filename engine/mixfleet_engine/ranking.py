"""The most likely tokens of each row, in order, without a sort of the whole vocabulary.

A row is looked at in blocks of neighbouring tokens. Their maxima cost one fast pass; the n most
likely tokens lie within the n blocks of highest maximum, so only few blocks are looked into.

Shape letters: R rows, V vocabulary, B blocks of a row, N ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Tokens of a block; a row's last one may have less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Tokens from the most likely one downwards, ties to the lower id."""

    token_ids: Tensor
    """``[R, N]``."""
    num_sure: Tensor
    """``[R, 1]`` ranks from the first that hold what a full sort would put there."""


def block_maxima(logits: Tensor) -> Tensor:
    """Return ``[R, B]`` highest logits of each block of ``[R, V]``; a NaN is above everything."""
    vocab_size = logits.shape[-1]
    num_whole = vocab_size // BLOCK
    maxima = logits[:, : num_whole * BLOCK].view(len(logits), num_whole, BLOCK).amax(-1)
    if num_whole * BLOCK == vocab_size:
        return maxima
    return torch.cat([maxima, logits[:, num_whole * BLOCK :].amax(-1, keepdim=True)], dim=-1)


def argmax(logits: Tensor, maxima: Tensor) -> Tensor:
    """Return ``[R]`` ids of the highest logits, ties to the lowest id.

    Args:
        logits: ``[R, V]``.
        maxima: ``[R, B]`` their block maxima. torch's own argmax over all V takes several times
            as long as both passes here.
    """
    token_ids = _tokens_of(maxima.argmax(-1, keepdim=True))
    inside = _values_at(logits, token_ids)
    return token_ids.gather(1, inside.argmax(-1, keepdim=True))[:, 0]


def rank(logits: Tensor, maxima: Tensor, *, num_ranks: int, num_blocks: int) -> Ranking:
    """Return the ``num_ranks`` most likely tokens, or all where the vocabulary has less.

    At least the first ``num_blocks`` of them are sure, mostly all.

    Args:
        logits: ``[R, V]`` fp32.
        maxima: ``[R, B]`` their block maxima.
        num_ranks: N.
        num_blocks: So many blocks are looked into, with B or more of them nothing is unsure;
            else they must hold ``num_ranks`` tokens.
    """
    vocab_size = logits.shape[-1]
    if num_blocks >= maxima.shape[-1]:
        every_id = torch.arange(vocab_size, device=logits.device)
        token_ids = _highest(_keys(logits, every_id), min(num_ranks, vocab_size))[1]
        num_sure = torch.full_like(token_ids[:, :1], token_ids.shape[-1])
        return Ranking(token_ids=token_ids, num_sure=num_sure)
    numbers = torch.arange(maxima.shape[-1], device=logits.device)
    block_keys, blocks = _highest(_keys(maxima, numbers), num_blocks + 1)
    inside = _tokens_of(blocks[:, :-1, None]).flatten(1)
    values = _values_at(logits, inside)
    keys, token_ids = _highest(_keys(values, inside), num_ranks)
    # Only a NaN can stand below what fills up the last block.
    token_ids.clamp_max_(vocab_size - 1)
    # No token outside stands above the first token of the best block outside, had that token the
    # block's maximum.
    outside = block_keys[:, -1:] - blocks[:, -1:] * (BLOCK - 1)
    return Ranking(token_ids=token_ids, num_sure=(keys > outside).sum(-1, keepdim=True))


def _tokens_of(blocks: Tensor) -> Tensor:
    """Return ids ``[..., BLOCK]`` of the tokens of blocks ``[..., 1]``, some beyond the last."""
    return blocks * BLOCK + torch.arange(BLOCK, device=blocks.device)


def _values_at(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the logits of ``token_ids``, -inf beyond the last."""
    vocab_size = logits.shape[-1]
    if vocab_size % BLOCK == 0:
        return logits.gather(1, token_ids)
    values = logits.gather(1, token_ids.clamp_max(vocab_size - 1))
    return values.masked_fill_(token_ids >= vocab_size, float("-inf"))


def ordered_bits(values: Tensor) -> Tensor:
    """Return 32-bit integers that compare as the fp32 ``values`` do."""
    bits = (values + 0.0).view(torch.int32)  # -0 and 0 are equal, their bits are not
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _keys(values: Tensor, numbers: Tensor) -> Tensor:
    """Return 64-bit integers ordered by value, fp32, and among equals by falling number.

    The upper half holds the value's ordered bits; the number, below 2**31, is taken off.
    """
    return ordered_bits(values).long().bitwise_left_shift_(32).sub_(numbers)


def _highest(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` highest keys of each row, in order, and the numbers in them."""
    found = keys.topk(count, dim=-1).values
    return found, -found & 0xFFFFFFFF
