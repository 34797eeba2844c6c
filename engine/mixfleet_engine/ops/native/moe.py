"""The experts' half of a Mixtral layer in one call.

Shape letters: T tokens in the step, D model width, F expert width, E experts, K experts per token.
"""

import ctypes
from typing import Final

import torch
from torch import Tensor

from mixfleet_engine.layer_weights import MoeWeights
from mixfleet_engine.ops.native.library import MoeStruct, NativeLibrary
from mixfleet_engine.ops.native.matrix import PackedMatrices
from mixfleet_engine.ops.native.memory import Scratch

MAX_ROWS: Final = 512
"""Tokens of one call: enough to read the weights seldom, and no more scratch than that takes."""


class NativeMoe:
    """Norm, router and experts; implements ``MoeBlock``.

    Under tensor parallelism the experts are slices along F, and the result a partial sum.

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
        weights: MoeWeights,
        library: NativeLibrary,
        threads: int,
        scratch: Scratch | None = None,
    ) -> None:
        self._functions = library.functions
        self._threads = threads
        shared = all(expert is weights.experts[0] for expert in weights.experts)
        experts = weights.experts[:1] if shared else weights.experts
        self._w13 = PackedMatrices(
            library, [expert.w13 for expert in experts], gate_up=True, threads=threads
        )
        self._w2 = PackedMatrices(library, [expert.w2 for expert in experts], threads=threads)
        self._norm = weights.norm.float().contiguous()
        self._gate = weights.gate.float().contiguous()
        self._struct = self._make_struct(weights, shared=shared)
        self._scratch = scratch or Scratch()

    def _make_struct(self, weights: MoeWeights, *, shared: bool) -> MoeStruct:
        width = (self._w2.n,)
        assert self._norm.shape == self._gate.shape[1:] == (self._w13.k,) == width
        assert len(self._gate) == len(weights.experts) >= weights.experts_per_token
        assert self._w13.n == 2 * self._w2.k
        return MoeStruct(
            num_experts=len(weights.experts),
            top_k=weights.experts_per_token,
            d=self._w2.n,
            f=self._w2.k,
            shared=shared,
            norm_eps=weights.norm_eps,
            norm=self._norm.data_ptr(),
            gate=self._gate.data_ptr(),
            w13=self._w13.array,
            w2=self._w2.array,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the block adds to the running sum ``x`` ``[T, D]`` fp32."""
        x = x.float().contiguous()
        out = torch.empty_like(x)
        self._run(x, out)
        return out

    def add_to(self, x: Tensor) -> None:
        """Add the block's output onto the running sum ``x`` ``[T, D]``, fp32 and contiguous."""
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        self._run(x, x)

    def _run(self, x: Tensor, out: Tensor) -> None:
        # Sizes by `shape`: `len` of a tensor is Python code, and this runs for every layer.
        num_rows, struct = x.shape[0], ctypes.byref(self._struct)
        row_bytes = 4 * x.shape[1]
        for start in range(0, num_rows, MAX_ROWS):
            count = min(MAX_ROWS, num_rows - start)
            num_bytes = self._functions.mf_moe_scratch_bytes(struct, count)
            self._functions.mf_moe_run(
                struct,
                x.data_ptr() + start * row_bytes,
                count,
                out.data_ptr() + start * row_bytes,
                self._scratch.pointer(num_bytes),
                self._threads,
            )
