"""Which kernel computes a product, and with which tiles: by the number of tokens and by tuning."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from mixfleet_engine.ops.cuda import gemm, gemv
from mixfleet_engine.ops.cuda.alignment import Alignment
from mixfleet_engine.ops.cuda.packed import PackedWeight
from mixfleet_engine.ops.cuda.quant import Rows, values_of
from mixfleet_engine.ops.cuda.tiles import Tiles, candidates, rows_per_tile
from mixfleet_engine.ops.cuda.tuning import Tuner, TuningKey, tokens_bucket

_UNEVEN: Final = 1.25
"""Some experts get more tokens than others; a second tile of one reads its weights twice."""


@dataclass(slots=True, kw_only=True)
class Products:
    """The products of one device's blocks, which share it."""

    dtype: torch.dtype
    """What is computed in."""
    tuner: Tuner
    shared_bytes: int
    """What a program may have of a multiprocessor's shared memory."""
    batch_invariant: bool
    """Whether a token's numbers may not depend on how many there are. It may be changed between
    steps, but not under a recorded one."""

    def is_few(self, num_tokens: int) -> bool:
        """Whether so many tokens go past the matrix units."""
        return not self.batch_invariant and num_tokens <= gemv.MOST_TOKENS

    def wants_fp8(self, weight: PackedWeight, num_tokens: int) -> bool:
        """Whether the product with ``weight`` takes so many tokens in fp8."""
        return weight.form == "fp8" and not self.is_few(num_tokens)

    def dense(
        self,
        x: Rows,
        weight: PackedWeight,
        *,
        dtype: torch.dtype | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Return ``x @ weight.T``, or add it to ``add_to``; see `gemm.dense`."""
        dtype = dtype or self.dtype
        if isinstance(x, Tensor) and self.is_few(len(x)):
            return gemv.dense(x, weight, dtype=dtype, add_to=add_to)

        def run(tiles: Tiles, target: Tensor | None = add_to) -> Tensor:
            return gemm.dense(x, weight, tiles, dtype=dtype, add_to=target)

        def trial(tiles: Tiles) -> None:
            run(tiles, None if add_to is None else torch.empty_like(add_to))

        num_rows = len(values_of(x))
        block_t = rows_per_tile(num_rows, weight.form)
        return run(self._tiles("dense", weight, block_t, num_rows, trial))

    def dense_up(self, x: Rows, weight: PackedWeight) -> Tensor:
        """Return ``silu(gate) * up`` of the only matrix; see `gemm.dense_up`."""
        if isinstance(x, Tensor) and self.is_few(len(x)):
            return gemv.dense_up(x, weight, dtype=self.dtype)

        def run(tiles: Tiles) -> Tensor:
            return gemm.dense_up(x, weight, tiles, dtype=self.dtype)

        num_rows = len(values_of(x))
        block_t = rows_per_tile(num_rows, weight.form)
        return run(self._tiles("dense_up", weight, block_t, num_rows, run, swiglu=True))

    def block_t(self, num_pairs: int, weight: PackedWeight) -> int:
        """Return the tile for so many pairs of token and expert."""
        return rows_per_tile(math.ceil(_UNEVEN * num_pairs / weight.num_matrices), weight.form)

    def experts_up(self, x: Rows, weight: PackedWeight, alignment: Alignment) -> Tensor:
        """Return ``silu(gate) * up`` of each pair; see `gemm.experts_up`."""

        def run(tiles: Tiles) -> Tensor:
            return gemm.experts_up(x, weight, alignment, tiles, dtype=self.dtype)

        num_rows, block_t = len(values_of(x)), alignment.block_t
        return run(self._tiles("experts_up", weight, block_t, num_rows, run, swiglu=True))

    def experts_down(self, h: Rows, weight: PackedWeight, alignment: Alignment) -> Tensor:
        """Return each pair's product with its expert's matrix; see `gemm.experts_down`."""

        def run(tiles: Tiles) -> Tensor:
            return gemm.experts_down(h, weight, alignment, tiles, dtype=self.dtype)

        num_rows = len(values_of(h))
        return run(self._tiles("experts_down", weight, alignment.block_t, num_rows, run))

    def _tiles(
        self,
        kernel: str,
        weight: PackedWeight,
        block_t: int,
        num_rows: int,
        trial: Callable[[Tiles], object],
        *,
        swiglu: bool = False,
    ) -> Tiles:
        key = TuningKey(
            kernel=f"{kernel} block_t={block_t}",
            form=weight.form,
            n=weight.n,
            k=weight.k,
            tokens=tokens_bucket(num_rows),
            dtype=str(self.dtype).removeprefix("torch."),
        )
        # Kept: every product of every layer asks.
        found = candidates(weight.form, block_t, swiglu=swiglu, shared_bytes=self.shared_bytes)
        return self.tuner.choose(key, found, trial)
