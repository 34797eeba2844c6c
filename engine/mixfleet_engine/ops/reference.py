"""The reference back-end: plain torch, written to be obviously right, on any device.

Every other back-end is compared with it. Shape letters: see ``ops/door.py``; S tokens of context,
R query heads per KV head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.batch import DecodeGroup, PrefillChunk
from mixfleet_engine.kv_cache import picked
from mixfleet_engine.ops.door import Linear
from mixfleet_engine.quantise import Weight, dequantise


class ReferenceOps:
    """Plain torch, one sequence and one expert at a time."""

    @property
    def name(self) -> str:
        """What the setting ``backend`` calls it."""
        return "reference"

    def linear(self, weight: Weight) -> Linear:
        """See :class:`~mixfleet_engine.ops.door.Ops`."""
        return lambda x: F.linear(x, dequantise(weight, x.dtype))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.Ops`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * weight.float()).to(weight.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.Ops`."""
        cos, sin = cos[:, None], sin[:, None]  # [T, 1, A/2]: the same for every head
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x.dtype)

    def silu_mul(self, x: Tensor) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.Ops`."""
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def prefill_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, chunk: PrefillChunk
    ) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.Ops`."""
        length = chunk.start + chunk.num_rows
        return _attend(
            q,
            _context(keys, chunk.block_table, length),
            _context(values, chunk.block_table, length),
        )

    def decode_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup
    ) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.Ops`."""
        rows = [
            _attend(
                q[row : row + 1], _context(keys, table, length), _context(values, table, length)
            )
            for row, (table, length) in enumerate(
                zip(group.block_tables, group.lengths, strict=True)
            )
        ]
        return torch.cat(rows)

    def mix_experts(
        self, x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Linear]
    ) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.Ops`."""
        mixed = torch.zeros_like(x, dtype=torch.float32)
        for number, expert in enumerate(experts):
            tokens, places = torch.where(chosen == number)
            if len(tokens):
                share = weights[tokens, places].unsqueeze(-1)
                mixed.index_add_(0, tokens, expert(x[tokens]).float() * share)
        return mixed.to(x.dtype)


def _context(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """Return the first ``length`` entries of one sequence, ``[S, G, A]`` fp32."""
    return picked(cache, block_table, torch.float32).flatten(0, 1)[:length]


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return causal attention of the last T of S tokens, in fp32.

    Args:
        q: ``[T, H, A]``; heads ``g*R .. g*R + R - 1`` share KV head ``g``.
        keys: ``[S, G, A]``.
        values: ``[S, G, A]``.
    """
    (num_q, num_heads, head_dim), (length, num_kv, _) = q.shape, keys.shape
    grouped = q.float().view(num_q, num_kv, num_heads // num_kv, head_dim)
    scores = torch.einsum("tgra,sga->grts", grouped, keys) * head_dim**-0.5
    ahead = torch.ones(num_q, length, dtype=torch.bool, device=q.device).triu(length - num_q + 1)
    shares = scores.masked_fill(ahead, float("-inf")).softmax(-1)
    mixed = torch.einsum("grts,sga->tgra", shares, values)
    return mixed.reshape(num_q, num_heads, head_dim).to(q.dtype)
