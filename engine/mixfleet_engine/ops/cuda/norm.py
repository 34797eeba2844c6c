"""The RMS norm, and in the same pass over a row what stands before and behind it.

Before: the half layer's result is added to the running sum, be it plain or the outputs of experts
times their shares. Behind: the quantisation to fp8, or the choice of experts.

One program has one row. The row's squares are added up across its threads in an order that hangs
on D alone; experts' outputs are added in the order of the choices.

Shape letters: T tokens, D model width, E experts, K experts per token. For one token of Mixtral
8x7B (D = 4096): running sum 16 KiB read and written, what is added 8 KiB (of experts twice that),
normed row 8 KiB, in fp8 4 KiB; the weight's 8 KiB and the gate's 128 KiB come from L2.
About 10 operations per number, with the router 26.
"""

from typing import Final, Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.combine import mixed_outputs
from mixfleet_engine.ops.cuda.dialect import rounded
from mixfleet_engine.ops.cuda.quant import QuantisedRows, empty_rows, numbers_and_scales, to_fp8
from mixfleet_engine.ops.cuda.router import (
    choose,
    empty_choices,
    fetch_gate,
    gate_scores,
    gate_sizes,
)

DTYPES: Final = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
NO_ROUTING: Final = {"E": 0, "E_PAD": 0, "K_PAD": 0, "CHUNK": 0}


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    quantise: Literal[False] = False,
    add: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    quantise: Literal[True],
    add: Tensor | None = None,
    shares: Tensor | None = None,
) -> QuantisedRows: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    quantise: bool = False,
    add: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor | QuantisedRows:
    """Return ``x`` ``[T, D]`` at root mean square 1, times ``weight``, in ``dtype`` or in fp8.

    Args:
        x: fp32; changed in place where something is added.
        weight: ``[D]``, any floating dtype.
        eps: Added to the mean square.
        dtype: Of the result, where it is not quantised.
        quantise: Whether to return it in fp8, each row with its scale.
        add: ``[T, D]``, any floating dtype: added to ``x`` first. With ``shares``: ``[T * K, D]``,
            outputs of experts, of which the weighted sums are added.
        shares: ``[T, K]`` fp32.
    """
    top_k = _checked_top_k(x, add, shares)
    normed = _empty(x, dtype, quantise=quantise)
    _launch(x, weight, eps, normed, dtype=dtype, add=add, shares=shares, sizes={"K": top_k})
    return normed


def norm_and_route(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor,
    top_k: int,
    *,
    dtype: torch.dtype,
    quantise: bool = False,
) -> tuple[Tensor | QuantisedRows, Tensor, Tensor]:
    """Return what `rms_norm` does, and shares and numbers of the chosen experts.

    The router sees the normed row rounded to ``dtype``, quantised or not, as `route` would.

    Args:
        x: ``[T, D]`` fp32.
        weight: ``[D]``, any floating dtype.
        eps: Added to the mean square.
        gate: ``[E, D]`` fp32.
        top_k: K.
        dtype: Of the normed rows, where they are not quantised.
        quantise: Whether to return them in fp8, each row with its scale.
    """
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    found = empty_choices(len(x), gate, top_k)
    normed = _empty(x, dtype, quantise=quantise)
    _launch(
        x,
        weight,
        eps,
        normed,
        dtype=dtype,
        routing=(gate, *found),
        sizes=gate_sizes(gate, top_k),
    )
    return normed, *found


def _checked_top_k(x: Tensor, add: Tensor | None, shares: Tensor | None) -> int:
    """Return K, 0 where no experts' outputs are added."""
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    top_k = 0 if shares is None else shares.shape[1]
    if add is not None:
        assert add.is_contiguous()
        assert add.shape == (len(x) * max(top_k, 1), x.shape[1])
    if shares is not None:
        assert add is not None
        assert shares.is_contiguous()
    return top_k


def _empty(x: Tensor, dtype: torch.dtype, *, quantise: bool) -> Tensor | QuantisedRows:
    if quantise:
        return empty_rows(len(x), x.shape[1], x.device)
    return torch.empty_like(x, dtype=dtype)


def _launch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    normed: Tensor | QuantisedRows,
    *,
    dtype: torch.dtype,
    sizes: dict[str, int],
    add: Tensor | None = None,
    shares: Tensor | None = None,
    routing: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> None:
    if len(x) == 0:
        return
    block = triton.next_power_of_2(x.shape[1])
    _rms_norm[(len(x),)](
        x,
        add,
        shares,
        weight,
        *numbers_and_scales(normed),
        *routing,
        eps,
        BLOCK_D=block,
        DTYPE=DTYPES[dtype],
        num_warps=max(1, min(16, block // 256)),
        **(NO_ROUTING | {"D": x.shape[1]} | sizes),
    )


@triton.jit
def _rms_norm(
    x_ptr,
    add_ptr,
    added_shares_ptr,
    weight_ptr,
    normed_ptr,
    scales_ptr,
    gate_ptr,
    shares_ptr,
    chosen_ptr,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    if gate_ptr is not None:
        fetch_gate(gate_ptr, D, E)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    x = tl.load(x_ptr + row * D + columns, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if add_ptr is not None:
        if added_shares_ptr is not None:
            x += mixed_outputs(add_ptr, added_shares_ptr, row, columns, inside, D, K)
        else:
            x += tl.load(add_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * D + columns, x, mask=inside)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
    normed = x * inverse * weight
    if scales_ptr is not None:
        values, scale = to_fp8(normed)
        tl.store(normed_ptr + row * D + columns, values, mask=inside)
        tl.store(scales_ptr + row, scale)
    else:
        tl.store(normed_ptr + row * D + columns, rounded(normed, DTYPE), mask=inside)
    if gate_ptr is not None:
        # The scores want other columns in each thread: the row comes back from the L1 cache.
        tl.debug_barrier()
        scores = gate_scores(
            x_ptr + row * D, weight_ptr, inverse, gate_ptr, D, E, E_PAD, CHUNK, DTYPE
        )
        choose(scores, row, shares_ptr, chosen_ptr, E, K, E_PAD, K_PAD)
