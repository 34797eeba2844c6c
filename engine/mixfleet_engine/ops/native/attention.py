"""The attention half of a Mixtral layer in one call.

Shape letters: T tokens in the step, D model width, H query heads, G KV heads, A head dimension,
C chunks in the step.
"""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any, Final

import torch
from torch import Tensor

from mixfleet_engine.batch import Batch, ChunkTable
from mixfleet_engine.errors import NativeUnavailableError
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.layer_weights import AttentionWeights
from mixfleet_engine.ops.native.library import MatrixStruct, NativeLibrary
from mixfleet_engine.ops.native.matrix import PackedMatrices
from mixfleet_engine.ops.native.memory import Scratch

UNIT: Final = 16
"""Positions that lie side by side in the KV cache, and numbers of one vector register."""
MAX_HEAD_DIM: Final = 256


class HeadsStruct(Structure):
    """``struct mf_heads``: how many heads of which size."""

    _fields_ = (("num_queries", c_int64), ("num_kv", c_int64), ("dim", c_int64))


class KvStruct(Structure):
    """``struct mf_kv``: where a layer of the KV cache lies."""

    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("block_size", c_int64))


class ChunksStruct(Structure):
    """``struct mf_chunks``: a :class:`~mixfleet_engine.batch.ChunkTable`."""

    _fields_ = (
        ("count", c_int64),
        ("first_rows", c_void_p),
        ("num_rows", c_void_p),
        ("starts", c_void_p),
        ("table_offsets", c_void_p),
        ("tables", c_void_p),
    )


class _AttentionStruct(Structure):
    """``struct mf_attention``."""

    _fields_ = (
        ("heads", HeadsStruct),
        ("norm", c_void_p),
        ("norm_eps", c_float),
        ("wqkv", POINTER(MatrixStruct)),
        ("wo", POINTER(MatrixStruct)),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


_STRUCTS: Final = (POINTER(_AttentionStruct), POINTER(ChunksStruct))
_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "mf_attention_scratch_bytes": (c_int64, (*_STRUCTS, c_int64, c_int32)),
    "mf_attention_run": (
        None,
        (*_STRUCTS, POINTER(KvStruct), c_void_p, c_int64, c_void_p, c_void_p, c_int32),
    ),
}


class AttentionWorkspace:
    """What the layers of one model share: memory, and the step's chunks in C's form.

    Not for two calls at once.
    """

    def __init__(self) -> None:
        self.scratch = Scratch()
        self._table: ChunkTable | None = None
        self._struct = ChunksStruct()

    def chunks(self, table: ChunkTable) -> ChunksStruct:
        """Return ``table`` as ``struct mf_chunks``; good until the next call."""
        if self._table is not table:
            self._table = table
            self._struct = ChunksStruct(
                len(table.first_rows),
                table.first_rows.data_ptr(),
                table.num_rows.data_ptr(),
                table.starts.data_ptr(),
                table.table_offsets.data_ptr(),
                table.tables.data_ptr(),
            )
        return self._struct


class NativeAttention:
    """Norm, projections, rotary embedding, KV cache and attention; implements ``AttentionBlock``.

    It orders the bytes of a block of the KV cache in its own way (``mf_attention.h``), so nobody
    else can read what it stores. Under tensor parallelism the heads are the rank's, and the
    result is a partial sum.

    Args:
        weights: Not needed afterwards.
        library: What packs and computes.
        cos: ``[positions, A/2]`` fp32, of every position that sequences may reach.
        sin: The same for sines.
        threads: How many compute; their number changes no bit.
        workspace: Shared by the layers of a model; None: one of its own.

    Raises:
        NativeUnavailableError: The heads are of a size that the library does not take.
        ConfigError: The library does not compute with weights of this form.
    """

    def __init__(
        self,
        weights: AttentionWeights,
        library: NativeLibrary,
        cos: Tensor,
        sin: Tensor,
        threads: int,
        workspace: AttentionWorkspace | None = None,
    ) -> None:
        check_head_dim(weights.head_dim)
        for name, (result, arguments) in _SIGNATURES.items():
            library.declare(name, result, arguments)
        self._functions = library.functions
        self._layer = weights.layer
        self._threads = threads
        self._workspace = workspace or AttentionWorkspace()
        self._cache: KvCache | None = None
        self._kv = KvStruct()
        self._wqkv = PackedMatrices(library, (weights.wqkv,), threads=threads)
        self._wo = PackedMatrices(library, (weights.wo,), threads=threads)
        self._norm = weights.norm.float().contiguous()
        self._angles = (cos.float().contiguous(), sin.float().contiguous())
        self._struct = _AttentionStruct(
            heads=HeadsStruct(weights.n_heads, weights.n_kv_heads, weights.head_dim),
            norm=self._norm.data_ptr(),
            norm_eps=weights.norm_eps,
            wqkv=self._wqkv.array,
            wo=self._wo.array,
            cos=self._angles[0].data_ptr(),
            sin=self._angles[1].data_ptr(),
        )

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        """Return what the block adds to the running sum ``x`` ``[T, D]`` fp32.

        The keys and values of the T tokens are in ``cache`` afterwards.

        Raises:
            NativeUnavailableError: ``cache`` is of a form that the library does not take.
        """
        x = x.float().contiguous()
        out = torch.empty_like(x)
        self._run(x, out, batch, cache)
        return out

    def add_to(self, x: Tensor, batch: Batch, cache: KvCache) -> None:
        """Add the block's output onto the running sum ``x`` ``[T, D]``, fp32 and contiguous."""
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        self._run(x, x, batch, cache)

    def _run(self, x: Tensor, out: Tensor, batch: Batch, cache: KvCache) -> None:
        layer = ctypes.byref(self._struct)
        chunks = ctypes.byref(self._workspace.chunks(batch.chunks))
        run = self._functions
        num_rows = x.shape[0]  # `len` of a tensor is Python code, and this runs for every layer
        num_bytes = run.mf_attention_scratch_bytes(layer, chunks, num_rows, self._threads)
        run.mf_attention_run(
            layer,
            chunks,
            ctypes.byref(self._kv_of(cache)),
            x.data_ptr(),
            num_rows,
            out.data_ptr(),
            self._workspace.scratch.pointer(num_bytes),
            self._threads,
        )

    def _kv_of(self, cache: KvCache) -> KvStruct:
        # A model has one cache for life, and asking a tensor for addresses takes microseconds.
        if self._cache is not cache:
            keys, values = cache.layer(self._layer)
            check_cache(keys.dtype, keys.shape[1])
            self._kv = KvStruct(keys.data_ptr(), values.data_ptr(), keys.shape[1])
            self._cache = cache
        return self._kv


def check_head_dim(head_dim: int) -> None:
    """Return if the library takes heads of this size.

    Raises:
        NativeUnavailableError: It does not.
    """
    if head_dim % UNIT or not 0 < head_dim <= MAX_HEAD_DIM:
        raise NativeUnavailableError(
            f"head_dim={head_dim}: native attention takes multiples of {UNIT} to {MAX_HEAD_DIM}"
        )


def check_cache(dtype: torch.dtype, block_size: int) -> None:
    """Return if the library takes a KV cache of this form.

    Raises:
        NativeUnavailableError: It does not.
    """
    if dtype != torch.bfloat16:
        raise NativeUnavailableError(f"KV cache in {dtype}: native attention takes torch.bfloat16")
    if block_size % UNIT:
        raise NativeUnavailableError(
            f"block_size={block_size}: native attention takes multiples of {UNIT}"
        )
