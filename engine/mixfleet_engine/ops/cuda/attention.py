"""Attention of a step over the paged KV cache: decodes by split, prefills by rows.

Shape letters: T tokens, C chunks, H query heads, G KV heads, A head dimension. What is summed how,
and why the bits are the same whoever asks, is in `attention_tile`.
"""

from typing import Final

import torch
import triton
from torch import Tensor

from mixfleet_engine.errors import ConfigError
from mixfleet_engine.ops.cuda.attention_tile import BLOCK_M, SPLIT
from mixfleet_engine.ops.cuda.chunks import DeviceChunks
from mixfleet_engine.ops.cuda.paged_attention import decode
from mixfleet_engine.ops.cuda.prefill_attention import prefill

_LEAST_HEAD_DIM: Final = 16


def check_head_dim(head_dim: int) -> None:
    """Raise ConfigError if heads of this dimension cannot be attended to."""
    if head_dim < _LEAST_HEAD_DIM or head_dim != triton.next_power_of_2(head_dim):
        raise ConfigError(
            f"head_dim={head_dim}: the cuda back-end takes powers of two from {_LEAST_HEAD_DIM}; "
            "use backend='reference'"
        )


def attend(
    q: Tensor, keys: Tensor, values: Tensor, chunks: DeviceChunks, *, split: int = SPLIT
) -> Tensor:
    """Return causal attention of the step's tokens over their own contexts, ``[T, H, A]``.

    Args:
        q: ``[T, H, A]``.
        keys: The layer's cache ``[num_blocks, block_size, G, A]``, the step's own tokens in it; in
            the dtype of ``q`` or float8_e4m3fn.
        values: The same.
        chunks: Where the sequences stand. Nothing is written to rows of no chunk.
        split: Tokens of a split; another number gives other last bits.
    """
    assert q.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert chunks.block_tables.stride(1) == 1
    assert q.shape[1] // keys.shape[2] <= BLOCK_M
    mixed = torch.empty_like(q)
    num_chunks = len(chunks.num_rows)
    if chunks.num_decodes:
        decode(q, keys, values, chunks, mixed, split)
    if num_chunks > chunks.num_decodes:
        prefill(q, keys, values, chunks, mixed, split)
    return mixed
