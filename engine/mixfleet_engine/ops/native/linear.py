"""One matrix as a function of its input. Shape letters: T rows, K inputs, N outputs."""

import torch
from torch import Tensor

from mixfleet_engine.ops.native.library import NativeLibrary
from mixfleet_engine.ops.native.matrix import PackedMatrices
from mixfleet_engine.ops.native.memory import Scratch
from mixfleet_engine.quantise import Weight


class NativeLinear:
    """``[T, K]`` fp32 or bf16 -> ``[T, N]`` fp32; implements ``Linear``.

    Args:
        weight: ``[N, K]``; not needed afterwards.
        library: What packs and multiplies.
        threads: How many compute; their number changes no bit.

    Raises:
        ConfigError: The library does not compute with weights of this form.
    """

    def __init__(self, weight: Weight, library: NativeLibrary, threads: int) -> None:
        self._functions = library.functions
        self._threads = threads
        self._matrix = PackedMatrices(library, (weight,), threads=threads)
        self._scratch = Scratch()

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``x`` times the matrix."""
        x = x.float().contiguous()
        array, num_rows = self._matrix.array, len(x)
        out = torch.empty(num_rows, self._matrix.n)
        scratch = self._scratch.pointer(self._functions.mf_linear_scratch_bytes(array, num_rows))
        self._functions.mf_linear(
            array, x.data_ptr(), num_rows, out.data_ptr(), scratch, self._threads
        )
        return out
