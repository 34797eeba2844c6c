"""The router: which experts a token goes to, and with what shares.

Scores are plain fp32 products and sums: the choice should not hang on the rounding of tf32. The
columns are added up in chunks of one size, then across the threads of one program, whatever the
number of tokens. Of equal scores the lower expert's comes first; a NaN comes last, so that even a
row of NaN has K distinct experts.

Shape letters: T tokens, D model width, E experts, K experts per token. For one token of Mixtral
8x7B it reads the row (8 KiB) and the gate (128 KiB, which all tokens share in L2); 64 KFLOP.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.ops.cuda.dialect import INTERPRETED, rounded

TILE: Final = 4096
"""Numbers of the gate that are multiplied at once. More would take registers that two programs on
a multiprocessor share."""
SHORTEST: Final = 256
"""Columns of such a tile at least, however many experts there are."""
WARPS: Final = 16
LINE: Final = tl.constexpr(32)
"""fp32 numbers of a cache line."""
BOUND: Final = tl.constexpr(1e38)
"""Scores beyond it, and those that are not numbers, count as this far from zero."""
TAKEN: Final = tl.constexpr(float("-inf"))


def route(normed: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return shares (fp32) and numbers (int32) of the chosen experts, each ``[T, K]``.

    Args:
        normed: ``[T, D]``, any floating dtype.
        gate: ``[E, D]`` fp32.
        top_k: K.
    """
    assert normed.is_contiguous()
    shares, chosen = empty_choices(len(normed), gate, top_k)
    if len(normed):
        _route[(len(normed),)](
            normed, gate, shares, chosen, num_warps=WARPS, **gate_sizes(gate, top_k)
        )
    return shares, chosen


def empty_choices(num_tokens: int, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return room for shares and numbers of chosen experts."""
    shares = torch.empty(num_tokens, top_k, dtype=torch.float32, device=gate.device)
    return shares, torch.empty_like(shares, dtype=torch.int32)


def gate_sizes(gate: Tensor, top_k: int) -> dict[str, Any]:
    """Return the constants of a kernel that routes."""
    assert gate.is_contiguous()
    assert gate.dtype == torch.float32
    num_experts, width = gate.shape
    assert top_k <= num_experts
    padded = triton.next_power_of_2(num_experts)
    return {
        "D": width,
        "E": num_experts,
        "K": top_k,
        "E_PAD": padded,
        "K_PAD": triton.next_power_of_2(top_k),
        "CHUNK": min(triton.next_power_of_2(width), max(SHORTEST, TILE // padded)),
    }


@triton.jit
def fetch_gate(gate_ptr, D: tl.constexpr, E: tl.constexpr):
    """Ask for the gate to be in L2, and do not wait.

    Since the layer's last step gigabytes of other weights went through L2. A single program that
    read the gate only when it needs it would spend several microseconds on it.
    """
    if not INTERPRETED:
        LINES: tl.constexpr = triton.cdiv(E * D, LINE)
        lines = tl.minimum(tl.arange(0, triton.next_power_of_2(LINES)), LINES - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [gate_ptr + lines * LINE],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def gate_scores(
    row_ptr,
    weight_ptr,
    inverse,
    gate_ptr,
    D: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return ``[E_PAD]`` scores of a row; those beyond E mean nothing.

    A ``weight_ptr`` that is not None is a norm's: the row is then normed first, with the
    ``inverse`` of its root mean square, and rounded to ``DTYPE``.
    """
    experts = tl.arange(0, E_PAD)[:, None]
    sums = tl.zeros([E_PAD, CHUNK], dtype=tl.float32)
    for first in tl.static_range(0, D, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        inside = columns < D
        row = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            row = rounded(row * inverse * weight, DTYPE).to(tl.float32)
        gate = tl.load(
            gate_ptr + experts * D + columns[None, :],
            mask=(experts < E) & inside[None, :],
            other=0.0,
        )
        sums += gate * row[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def choose(
    scores,
    row,
    shares_ptr,
    chosen_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
):
    """Store the experts of the K best scores of a row and the softmax over these scores."""
    experts = tl.arange(0, E_PAD)
    choices = tl.arange(0, K_PAD)
    free = experts < E
    ranked = tl.where(scores > -BOUND, tl.where(scores < BOUND, scores, BOUND), -BOUND)
    found = tl.full([K_PAD], -BOUND, dtype=tl.float32)
    numbers = tl.zeros([K_PAD], dtype=tl.int32)
    for choice in tl.static_range(K):
        best = tl.max(tl.where(free, ranked, TAKEN), axis=0)
        number = tl.min(tl.where(free & (ranked == best), experts, E_PAD), axis=0)
        found = tl.where(choices == choice, best, found)
        numbers = tl.where(choices == choice, number, numbers)
        free = free & (experts != number)
    # Mixtral normalises over the chosen K, not over all E: softmax after the choice.
    powers = tl.where(choices < K, tl.exp(found - tl.max(found, axis=0)), 0.0)
    tl.store(shares_ptr + row * K + choices, powers / tl.sum(powers, axis=0), mask=choices < K)
    tl.store(chosen_ptr + row * K + choices, numbers, mask=choices < K)


@triton.jit
def _route(
    x_ptr,
    gate_ptr,
    shares_ptr,
    chosen_ptr,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PAD: tl.constexpr,
    K_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores = gate_scores(
        x_ptr + row * D, None, 1.0, gate_ptr, D, E, E_PAD, CHUNK, x_ptr.dtype.element_ty
    )
    choose(scores, row, shares_ptr, chosen_ptr, E, K, E_PAD, K_PAD)
