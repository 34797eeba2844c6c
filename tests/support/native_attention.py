"""Native attention in a test's hands: a layer with its cache, and the paged kernel on its own.

Shape letters: T tokens, D model width, H query heads, G KV heads, A head dimension.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from mixfleet_engine.batch import ChunkTable, PrefillChunk, make_batch
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.layer_weights import AttentionWeights
from mixfleet_engine.ops.native.attention import (
    AttentionWorkspace,
    ChunksStruct,
    HeadsStruct,
    KvStruct,
    NativeAttention,
)
from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.rotary import RotaryTable
from support.native_cases import Form, make_case, native_library, random
from support.plans import chunk, plan
from support.tiny_model import tiny_config

CPU = torch.device("cpu")
EPS = 1e-5
CONTEXT = 6000


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How many heads of which size."""

    queries: int
    kv: int
    dim: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The next tokens of a sequence: activations ``[T, D]``, first position, block table."""

    x: Tensor
    start: int
    table: Sequence[int]


class AttentionLayer:
    """Random weights of one layer, its block of any number of threads, and the slow obvious way."""

    def __init__(
        self, heads: Heads, *, width: int = 96, form: Form = "bf16", seed: int = 0, size: float = 2
    ) -> None:
        self.heads, self.width = heads, width
        rows = (heads.queries + 2 * heads.kv) * heads.dim
        self._wqkv = make_case(form, rows, width, seed=seed)
        self._wo = make_case(form, width, heads.queries * heads.dim, seed=seed + 10)
        self._norm = ((random(width, seed=seed + 20) * 0.2 + 1) * size).bfloat16()
        self._rotary = RotaryTable(
            head_dim=heads.dim, context_length=CONTEXT, theta=10000.0, device=CPU
        )

    def block(
        self, threads: int = 1, workspace: AttentionWorkspace | None = None
    ) -> NativeAttention:
        weights = AttentionWeights(
            layer=0,
            n_heads=self.heads.queries,
            n_kv_heads=self.heads.kv,
            head_dim=self.heads.dim,
            norm=self._norm,
            norm_eps=EPS,
            wqkv=self._wqkv.weight,
            wo=self._wo.weight,
        )
        angles = self._rotary.cos, self._rotary.sin
        return NativeAttention(weights, native_library(), *angles, threads, workspace)

    def cache(
        self, num_blocks: int, block_size: int = 16, *, stale: float = 0.0, dtype: str = "bfloat16"
    ) -> KvCache:
        """Return a cache whose slots all hold the number ``stale``."""
        config = tiny_config(
            n_layers=1,
            n_heads=self.heads.queries,
            n_kv_heads=self.heads.kv,
            head_dim=self.heads.dim,
        )
        cache = KvCache(
            config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=getattr(torch, dtype),
            device=CPU,
        )
        for part in cache.layer(0):
            part.fill_(stale)
        return cache

    def inputs(self, num_tokens: int, seed: int = 5) -> Tensor:
        return random(num_tokens, self.width, seed=seed) * 3

    def expected(self, x: Tensor) -> Tensor:
        """Return what the block adds to a whole sequence ``[T, D]`` from position 0 on."""
        ops, (t, heads) = ReferenceOps(), (len(x), self.heads)
        normed = ops.rms_norm(x, self._norm.float(), EPS)
        qkv = self._wqkv.product(normed).view(t, -1, heads.dim)
        q, k, v = torch.split(qkv, [heads.queries, heads.kv, heads.kv], dim=1)
        angles = self._rotary.at(torch.arange(t))
        q, k = (ops.rotate(part, *angles) for part in (q, k))
        mixed = reference_attention(q, k, v)
        return self._wo.product(mixed.flatten(1))


def run(block: NativeAttention, cache: KvCache, pieces: Sequence[Piece]) -> list[Tensor]:
    """Run one step of these pieces and return the rows of each."""
    chunks = [chunk([0] * len(p.x), start=p.start, block_table=p.table) for p in pieces]
    batch = make_batch(plan(*chunks), cache.block_size, CPU)
    out = block(torch.cat([p.x for p in pieces]), batch, cache)
    return list(torch.split(out, [len(p.x) for p in pieces]))


def run_in_cuts(
    block: NativeAttention, cache: KvCache, x: Tensor, table: Sequence[int], cuts: Sequence[int]
) -> Tensor:
    """Run one sequence in steps of these sizes, in turn, each with no more blocks than it needs."""
    found, start, number = [], 0, 0
    while start < len(x):
        end = min(start + cuts[number % len(cuts)], len(x))
        needed = table[: -(-end // cache.block_size)]
        found += run(block, cache, [Piece(x[start:end], start, needed)])
        start, number = end, number + 1
    return torch.cat(found)


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ``[T, H, A]`` of a whole sequence, from numbers rounded to bf16, in fp32."""
    q, k, v = (part.bfloat16().float() for part in (q, k, v))
    whole = PrefillChunk(
        first_row=0, num_rows=len(q), start=0, block_table=torch.tensor([0]), mask=None
    )
    return ReferenceOps().prefill_attention(q, k[None], v[None], whole)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, of the expected norm."""
    return float((found - expected).norm() / expected.norm())


class _PlanStruct(Structure):
    """``struct mf_attention_plan``."""

    _fields_ = (
        ("num_items", c_int64),
        ("heads_per_item", c_int64),
        ("first_items", c_void_p),
        ("num_spans", c_void_p),
        ("first_partials", c_void_p),
    )


class PagedKernel:
    """Attention from queries and a cache to fp32, with no product after it that rounds.

    One thread runs it, with the work cut as for any number of them.
    """

    def __init__(self, heads: Heads) -> None:
        self._heads = HeadsStruct(heads.queries, heads.kv, heads.dim)
        library, chunks = native_library(), POINTER(ChunksStruct)
        library.declare("mf_num_partials", c_int64, (HeadsStruct, chunks, c_int32))
        library.declare(
            "mf_plan_attention", None, (HeadsStruct, chunks, c_int32, POINTER(_PlanStruct))
        )
        in_c = (HeadsStruct, chunks, POINTER(KvStruct), POINTER(_PlanStruct), c_void_p, c_int64)
        library.declare("mf_attend", None, (*in_c, c_void_p, c_void_p, c_void_p))
        self._functions = library.functions

    def __call__(self, q: Tensor, chunks: ChunkTable, cache: KvCache, threads: int = 1) -> Tensor:
        """Return ``[T, H, A]`` for the turned queries ``q`` ``[T, H, A]``."""
        (t, num_heads, dim), num_chunks = q.shape, len(chunks.starts)
        queries = q.bfloat16().view(t, self._heads.num_kv, -1, dim).transpose(0, 1).contiguous()
        keys, values = cache.layer(0)
        kv = KvStruct(keys.data_ptr(), values.data_ptr(), cache.block_size)
        struct = ctypes.byref(AttentionWorkspace().chunks(chunks))
        numbers = torch.full((3, num_chunks + 1), -1, dtype=torch.int64)
        c_plan = _PlanStruct(0, 0, *(row.data_ptr() for row in numbers))
        self._functions.mf_plan_attention(self._heads, struct, threads, ctypes.byref(c_plan))
        count = self._functions.mf_num_partials(self._heads, struct, threads)
        partials = torch.full((count * (dim + 2),), torch.nan)
        stats, mixed = torch.full((t, num_heads, 2), torch.nan), torch.full(q.shape, torch.nan)
        self._functions.mf_attend(
            self._heads,
            struct,
            ctypes.byref(kv),
            ctypes.byref(c_plan),
            queries.data_ptr(),
            t,
            partials.data_ptr(),
            stats.data_ptr(),
            mixed.data_ptr(),
        )
        return mixed


def store(cache: KvCache, k: Tensor, v: Tensor, table: Sequence[int]) -> None:
    """Write keys and values ``[T, G, A]`` of a sequence into its blocks, number by number's place.

    As ``mf_attention.h`` has it: units of 16 positions, in each keys ``[G][A/2][16][2]`` and values
    ``[G][8][A][2]``.
    """
    (t, num_kv, dim), block_size = k.shape, cache.block_size
    keys, values = (part.view(-1, num_kv * dim * 16) for part in cache.layer(0))
    for position in range(t):
        inside = position % block_size
        unit = table[position // block_size] * (block_size // 16) + inside // 16
        slot = inside % 16
        keys[unit].view(num_kv, dim // 2, 16, 2)[:, :, slot] = k[position].view(num_kv, -1, 2)
        values[unit].view(num_kv, 8, dim, 2)[:, slot // 2, :, slot % 2] = v[position]
