"""The end of the model in one call.

Shape letters: R rows to sample, D model width, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from mixfleet_engine.layer_weights import OutputWeights
from mixfleet_engine.ops.native.library import NativeLibrary, OutputStruct
from mixfleet_engine.ops.native.matrix import PackedMatrices
from mixfleet_engine.ops.native.memory import Scratch


class NativeOutput:
    """The last norm and the output matrix; implements ``OutputBlock``.

    Args:
        weights: Not needed afterwards.
        library: What packs and multiplies.
        threads: How many compute; their number changes no bit.
        scratch: Shared with blocks that never run at the same time; None: of its own.

    Raises:
        ConfigError: The library does not compute with weights of this form.
    """

    def __init__(
        self,
        weights: OutputWeights,
        library: NativeLibrary,
        threads: int,
        scratch: Scratch | None = None,
    ) -> None:
        self._functions = library.functions
        self._threads = threads
        self._matrix = PackedMatrices(library, (weights.weight,), threads=threads)
        self._norm = weights.norm.float().contiguous()
        self._struct = OutputStruct(self._norm.data_ptr(), weights.norm_eps, self._matrix.array)
        self._scratch = scratch or Scratch()

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits ``[R, V]`` in fp32 for the running sums ``x`` ``[R, D]``."""
        x = x.float().contiguous()
        num_rows, struct = len(x), ctypes.byref(self._struct)
        out = torch.empty(num_rows, self._matrix.n)
        scratch = self._scratch.pointer(self._functions.mf_output_scratch_bytes(struct, num_rows))
        self._functions.mf_output_run(
            struct, x.data_ptr(), num_rows, out.data_ptr(), scratch, self._threads
        )
        return out
