"""Packed matrices: made of a model's weights, kept alive for the C library.

Shape letters: N outputs, K inputs.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from mixfleet_engine.errors import ConfigError
from mixfleet_engine.ops.native.library import MatrixStruct, NativeLibrary, SourceStruct
from mixfleet_engine.ops.native.memory import ALIGNMENT, huge_buffer
from mixfleet_engine.quantise import Int4Weight, Int8Weight, Weight
from mixfleet_engine.weight_formats import INT4_GROUP

BF16: Final = 0
INT8: Final = 1
INT4: Final = 2


class PackedMatrices:
    """Matrices of one form in one piece of memory, an array of ``struct mf_matrix`` on it.

    Whoever hands ``array`` to C keeps this object alive.

    Args:
        library: What packs.
        weights: One or more, all of one shape and form; not needed afterwards.
        gate_up: The first half of the rows gates the second: they are packed side by side.
        threads: How many pack.

    Raises:
        ConfigError: A weight is of a dtype that the library does not compute in, or they differ.
    """

    def __init__(
        self,
        library: NativeLibrary,
        weights: Sequence[Weight],
        *,
        gate_up: bool = False,
        threads: int = 1,
    ) -> None:
        sources = [_Source(weight, gate_up=gate_up) for weight in weights]
        shapes = {source.shape for source in sources}
        if len(shapes) != 1:
            raise ConfigError(f"matrices of (format, N, K) {sorted(shapes)} in one block")
        self.format, self.n, self.k = shapes.pop()
        self.array = (MatrixStruct * len(sources))()
        self._memory = self._pack(library.functions, sources, threads)

    def _pack(self, functions: Any, sources: list["_Source"], threads: int) -> Tensor:
        first = ctypes.byref(sources[0].struct)
        values_bytes = _rounded(functions.mf_values_bytes(first))
        scales_bytes = _rounded(functions.mf_scales_bytes(first))
        each = values_bytes + scales_bytes
        memory = huge_buffer(each * len(sources))
        for number, source in enumerate(sources):
            values = memory.data_ptr() + number * each
            scales = values + values_bytes
            struct = ctypes.byref(source.struct)
            functions.mf_pack_matrix(struct, values, scales, threads)
            self.array[number] = MatrixStruct(
                self.format, functions.mf_packed_n(struct), self.k, values, scales
            )
        return memory


class _Source:
    """One weight as ``struct mf_source``, with the tensors that it points into."""

    def __init__(self, weight: Weight, *, gate_up: bool) -> None:
        values, scales, form = _parts(weight)
        n, k = values.shape
        k *= 2 if form == INT4 else 1
        groups = -(-k // INT4_GROUP) if form == INT4 else 1
        assert scales is None or scales.numel() == n * groups
        self.shape = (form, n, k)
        self._tensors = (values, scales)
        self.struct = SourceStruct(
            form, gate_up, n, k, values.data_ptr(), None if scales is None else scales.data_ptr()
        )


def _parts(weight: Weight) -> tuple[Tensor, Tensor | None, int]:
    """Return values, scales and format of a weight, contiguous on the CPU."""
    if isinstance(weight, Tensor) and weight.dtype == torch.bfloat16:
        return weight.cpu().contiguous(), None, BF16
    if isinstance(weight, Int4Weight) and weight.zeros is not None:
        raise ConfigError(
            "int4 weights with zero points: the native back-end takes symmetric ones; "
            "weight_dtype=int8 converts them, backend=cpu runs them as they are"
        )
    if isinstance(weight, Int8Weight | Int4Weight):
        form = INT8 if isinstance(weight, Int8Weight) else INT4
        scales = weight.scales.cpu().float().contiguous()
        return weight.values.cpu().contiguous(), scales, form
    found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
    raise ConfigError(f"weights in {found}: the native back-end takes bf16, int8 and int4")


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
