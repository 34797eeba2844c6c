"""The CPU back-end: weights packed by oneDNN, attention and experts with few, large products.

Shape letters: see ``ops/door.py``; R query heads per KV head, S slots of a decode group.
"""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.batch import DecodeGroup, PrefillChunk
from mixfleet_engine.kv_cache import picked
from mixfleet_engine.ops.cpu_quantised import QuantisedPacker, checked_quantised_packer
from mixfleet_engine.ops.door import Linear
from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.quantise import Quantised, Weight

logger = logging.getLogger(__name__)

Packer = Callable[[Tensor], Linear]


class CpuOps(ReferenceOps):
    """What a CPU does fast; what it does not list here it does like the reference."""

    def __init__(self, dtype: torch.dtype, packer: Packer | None = None) -> None:
        self._dtype = dtype
        self._packer = checked_packer(dtype, packer or pack_with_onednn)
        self._quantised_packers: dict[type[Quantised], QuantisedPacker] = {}

    @property
    def name(self) -> str:
        """What the setting ``backend`` calls it."""
        return "cpu"

    def linear(self, weight: Weight) -> Linear:
        """See :class:`~mixfleet_engine.ops.door.Ops`."""
        if isinstance(weight, Tensor):
            return self._packer(weight)
        form = type(weight)
        if form not in self._quantised_packers:
            self._quantised_packers[form] = checked_quantised_packer(form, self._dtype)
        return self._quantised_packers[form](weight, self._dtype)

    def prefill_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, chunk: PrefillChunk
    ) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.Ops`."""
        length = chunk.start + chunk.num_rows
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],  # [1, H, T, A]
            _context(picked(keys, chunk.block_table, q.dtype), length),
            _context(picked(values, chunk.block_table, q.dtype), length),
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=True,
        )
        return mixed[0].transpose(0, 1)

    def decode_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup
    ) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.Ops`.

        The R query heads that share a KV head become rows of one matrix, so keys and values are
        never repeated. One product per KV head, because the heads of a cache row are not
        neighbours in memory as a batched product over all of them would need.
        """
        num_seqs, num_heads, head_dim = q.shape
        keys, values = (_slots(part, group.block_tables, q.dtype) for part in (keys, values))
        num_kv = keys.shape[2]
        grouped = q.view(num_seqs, num_kv, num_heads // num_kv, head_dim)
        scores = torch.stack(
            [torch.bmm(grouped[:, g], keys[:, :, g].transpose(1, 2)) for g in range(num_kv)], dim=1
        ).float()  # [B, G, R, S]
        scores.mul_(head_dim**-0.5).masked_fill_(~group.mask[:, None, None], float("-inf"))
        shares = scores.softmax(-1).to(values.dtype)
        mixed = [torch.bmm(shares[:, g], values[:, :, g]) for g in range(num_kv)]
        return torch.stack(mixed, dim=1).view(num_seqs, num_heads, head_dim)

    def mix_experts(
        self, x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Linear]
    ) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.Ops`.

        Tokens are sorted by expert, so that each expert runs once over neighbouring rows and an
        expert that nobody chose is not touched.
        """
        if all(expert is experts[0] for expert in experts):
            # One stored copy: all the chosen give the same output, so it is computed once.
            return (experts[0](x).float() * weights.sum(-1, keepdim=True)).to(x.dtype)
        num_tokens, top_k = chosen.shape
        flat = chosen.flatten()  # [T*K]
        order = flat.argsort(stable=True)
        ends = flat.bincount(minlength=len(experts)).cumsum(0).tolist()
        rows = x[order // top_k]  # [T*K, D], the tokens of expert 0 first
        results = torch.empty_like(rows)
        start = 0
        for expert, end in zip(experts, ends, strict=True):
            if end > start:
                results[order[start:end]] = expert(rows[start:end])
            start = end
        shares = weights.unsqueeze(-1)  # [T, K, 1]
        return (results.view(num_tokens, top_k, -1).float() * shares).sum(1).to(x.dtype)


def _context(blocks: Tensor, length: int) -> Tensor:
    """Return the first ``length`` entries of a sequence's blocks, ``[1, G, length, A]``."""
    return blocks.flatten(0, 1)[:length].transpose(0, 1)[None]


def _slots(cache: Tensor, block_tables: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the slots of each sequence's blocks, ``[B, S, G, A]``."""
    num_seqs, num_blocks = block_tables.shape
    _, block_size, num_kv, head_dim = cache.shape
    blocks = picked(cache, block_tables.flatten(), dtype)
    return blocks.view(num_seqs, num_blocks * block_size, num_kv, head_dim)


def pack_with_onednn(weight: Tensor) -> Linear:
    """Return the product with ``weight`` laid out anew for this CPU.

    The two operations are private to torch, and nobody else here calls them; see
    :func:`checked_packer`. The packed matrix is a copy: the caller drops the original.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: Tensor) -> Tensor:
        product: Tensor = multiply(x, packed, None, "none", [], "")
        return product

    return linear


def pack_nothing(weight: Tensor) -> Linear:
    """Return the product with ``weight`` as it is."""
    return lambda x: F.linear(x, weight)


def checked_packer(dtype: torch.dtype, packer: Packer) -> Packer:
    """Return ``packer`` if it works here in ``dtype``, else :func:`pack_nothing` with a warning.

    Private operations may be missing, refuse this CPU or change; a small product tells.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    x = torch.randn(3, 32, generator=generator).to(dtype)
    try:
        difference = (packer(weight)(x) - F.linear(x, weight)).abs().max().item()
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("weights are not packed in %s: %s", dtype, error)
        return pack_nothing
    allowed = 32 * torch.finfo(dtype).eps
    if difference <= allowed:
        return packer
    logger.warning(
        "weights are not packed in %s: off by %g, allowed %g", dtype, difference, allowed
    )
    return pack_nothing


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bf16 itself; without, fp32 is 3 to 10 times faster."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False
