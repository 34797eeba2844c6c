"""Weights in fewer bits: how they are made, what they hold and what they stand for.

Which weight gets which form says ``weight_formats.py``. All work is done on a slab of rows at a
time, so that its scratch memory does not grow with the matrix.

Shape letters: N output width, K input width, G groups of 128 along K, the last may be shorter.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.errors import CheckpointError, ConfigError
from mixfleet_engine.weight_formats import INT4_GROUP, WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """Eight bits per number, one scale per output row, symmetric."""

    values: Tensor
    """``[N, K]`` int8, -127 to 127."""
    scales: Tensor
    """``[N]`` fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Weight:
    """Four bits per number, one scale per output row and group of 128 inputs.

    What is quantised here is symmetric: zero stands at zero. Checkpoints may come with a zero point
    per group; a number q then means ``(q - zero) * scale``.
    """

    values: Tensor
    """``[N, K / 2]`` uint8: two numbers, the even input's in the low four bits. From -8 to 7 in
    two's complement; with ``zeros`` from 0 to 15, unsigned."""
    scales: Tensor
    """``[N, G]`` fp32. May be negative: -8 then stands for a large positive number."""
    zeros: Tensor | None = None
    """``[N, G]`` fp32, whole numbers from 0 to 15; None: symmetric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """``float8_e4m3fn`` with one scale per output row."""

    values: Tensor
    """``[N, K]`` float8_e4m3fn."""
    scales: Tensor
    """``[N]`` fp32."""


Weight = Tensor | Int8Weight | Int4Weight | Fp8Weight
"""A matrix ``[N, K]`` in any of the forms that a back-end takes."""
Quantised = Int8Weight | Int4Weight | Fp8Weight

SLAB_NUMBERS: Final = 1 << 19
"""Numbers of one slab: its scratch of 5 fp32 copies, 10 MiB, stays in a server's cache."""
GPU_SLAB_NUMBERS: Final = 1 << 24
"""On a GPU: scratch of 320 MiB, and so few slabs that their launches do not count."""
INT8_MAX: Final = 127
FP8_MAX: Final = 448
SMALLEST: Final = 1e-34
"""Below this, scales and their inverses leave fp32's range. A row or group of nothing larger is
zero for any purpose."""

DIVISORS: Final = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0, 11.0)
"""Tried for each group of int4: a step is the number of largest magnitude over one of them. At 7
all steps are symmetric, at 8 that number is -8 exactly, above it is clipped for finer steps."""


def quantise(matrix: Tensor, weight_format: WeightFormat, name: str) -> Weight:
    """Return ``matrix`` in the form ``weight_format``, on its own device; the same for ``plain``.

    Args:
        matrix: ``[N, K]``, any floating dtype; not changed.
        weight_format: As `format_of` says.
        name: Of the weight, for errors.

    Raises:
        CheckpointError: A number is not finite.
        ConfigError: K is odd, so int4 cannot store it.
    """
    match weight_format:
        case "plain":
            return matrix
        case "int8":
            values = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
            return Int8Weight(values=values, scales=_fill_rows(matrix, values, INT8_MAX, name))
        case "fp8":
            values = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn, device=matrix.device)
            return Fp8Weight(values=values, scales=_fill_rows(matrix, values, FP8_MAX, name))
        case "int4":
            return _int4(matrix, name)


def dequantise(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the matrix ``[N, K]`` that ``weight`` stands for, rounded once to ``dtype``."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    matrix = torch.empty(shape_of(weight), dtype=dtype, device=weight.values.device)
    for rows in slabs(len(matrix), matrix.shape[1], matrix.device):
        matrix[rows] = _dequantised_rows(weight, rows)
    return matrix


def shape_of(weight: Weight) -> tuple[int, int]:
    """Return ``(N, K)``."""
    stored = weight if isinstance(weight, Tensor) else weight.values
    n, width = stored.shape
    return n, 2 * width if isinstance(weight, Int4Weight) else width


def stacked(weights: Sequence[Weight]) -> Weight:
    """Return matrices of one form and width one above the other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(cast("list[Tensor]", list(weights)))
    return _like(first, lambda name: torch.cat([getattr(part, name) for part in weights]))


def form_of(weight: Weight) -> str:
    """Return in a word in which form a matrix is; those of one form can be stacked."""
    if isinstance(weight, Tensor):
        return f"plain {weight.dtype}".replace("torch.", "")
    asymmetric = isinstance(weight, Int4Weight) and weight.zeros is not None
    return type(weight).__name__ + (" with zero points" if asymmetric else "")


def rows_of(weight: Quantised, rows: slice) -> Quantised:
    """Return some rows of a matrix, sharing its memory."""
    return _like(weight, lambda name: getattr(weight, name)[rows])


def _like(weight: Quantised, make: Callable[[str], Tensor]) -> Quantised:
    """Return a weight of the same form, each of its tensors made by the tensor's name."""
    names = (field.name for field in fields(weight))
    return type(weight)(**{n: make(n) for n in names if getattr(weight, n) is not None})


def slabs(n: int, k: int, device: torch.device | None = None) -> Iterator[slice]:
    """Yield ranges of rows that cover ``[N, K]``, each a multiple of 64 rows or the last.

    Their size suits ``device``, and no result depends on it; None: a CPU.
    """
    on_cpu = device is None or device.type == "cpu"
    numbers = SLAB_NUMBERS if on_cpu else GPU_SLAB_NUMBERS
    height = max(64, numbers // max(k, 1) // 64 * 64)
    for start in range(0, n, height):
        yield slice(start, min(n, start + height))


def unpack_int4(values: Tensor) -> Tensor:
    """Return the numbers, ``[N, K]`` int8 from -8 to 7, of ``[N, K / 2]`` packed ones."""
    # Two's complement of four bits: 8 to 15 mean -8 to -1.
    return (unpack_nibbles(values) ^ 8).to(torch.int8) - 8


def unpack_nibbles(values: Tensor) -> Tensor:
    """Return ``[N, K]`` uint8 from 0 to 15 of ``[N, K / 2]`` packed ones."""
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)


def _dequantised_rows(weight: Quantised, rows: slice) -> Tensor:
    """Return rows of the matrix in fp32."""
    values, scales = weight.values[rows], weight.scales[rows]
    if not isinstance(weight, Int4Weight):
        return values.float() * scales[:, None]
    width = 2 * values.shape[1]
    if weight.zeros is None:
        numbers = unpack_int4(values).float()
    else:
        numbers = unpack_nibbles(values) - _each(weight.zeros[rows], width)
    return numbers * _each(scales, width)


def _each(per_group: Tensor, width: int) -> Tensor:
    """Return ``[N, K]``, every input's own of ``[N, G]``."""
    return per_group.repeat_interleave(INT4_GROUP, dim=1)[:, :width]


def _fill_rows(matrix: Tensor, values: Tensor, highest: int, name: str) -> Tensor:
    """Fill ``values`` and return the scales that make each row's largest magnitude ``highest``."""
    scales = torch.empty(len(matrix), dtype=torch.float32, device=matrix.device)
    for rows in slabs(len(matrix), matrix.shape[1], matrix.device):
        wide = matrix[rows].float()
        largest = _largest(wide, rows, name)
        inverse = torch.where(largest < SMALLEST, 0.0, highest / largest)
        wide = wide * inverse[:, None]
        values[rows] = wide.round_() if values.dtype == torch.int8 else wide
        scales[rows] = torch.where(largest < SMALLEST, 0.0, largest / highest)
    return scales


def _largest(wide: Tensor, rows: slice, name: str) -> Tensor:
    """Return the largest magnitude of each row of a slab.

    Raises:
        CheckpointError: A number is not finite.
    """
    largest = wide.abs().amax(dim=1)
    finite = largest.isfinite()
    if not finite.all():
        row = rows.start + int(finite.long().argmin())
        raise CheckpointError(f"{name}: row {row} holds a NaN or an infinity")
    return largest


def _int4(matrix: Tensor, name: str) -> Int4Weight:
    n, k = matrix.shape
    if k % 2:
        raise ConfigError(
            f"{name}: int4 stores two inputs in a byte, and this matrix has K={k}; use int8 or fp8"
        )
    num_groups = -(-k // INT4_GROUP)
    values = torch.empty(n, k // 2, dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(n, num_groups, dtype=torch.float32, device=matrix.device)
    for rows in slabs(n, k, matrix.device):
        wide = matrix[rows].float().contiguous()
        _largest(wide, rows, name)
        # Zeros behind the end of the last group change neither its scale nor its numbers.
        padded = F.pad(wide, (0, num_groups * INT4_GROUP - k))
        numbers, found = _best_groups(padded.view(-1, INT4_GROUP))
        pairs = numbers.view(len(wide), -1)[:, :k].to(torch.int8).view(torch.uint8)
        values[rows] = (pairs[:, ::2] & 15) | (pairs[:, 1::2] << 4)
        scales[rows] = found.view(len(wide), num_groups)
    return Int4Weight(values=values, scales=scales)


def _best_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers (as fp32) and the scale of each group that are nearest to ``[G, 128]``.

    For given numbers q the scale of least squared error is w·q / q·q, and it takes (w·q)² / q·q
    off the error. So each divisor gives numbers, and the numbers that take off most are kept.
    """
    extreme = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    safe = torch.where(extreme.abs() < SMALLEST, float("inf"), -extreme)
    unit = groups / safe  # from -1 to 1, and -1 at the extreme
    scratch = torch.empty_like(unit)
    most = unit.new_full((len(unit),), -1.0)
    divisors = torch.zeros_like(most)
    for divisor in DIVISORS:
        torch.mul(unit, divisor, out=scratch).round_().clamp_(-8, 7)
        length = torch.linalg.vector_norm(scratch, dim=1).clamp_(min=1)
        gain = scratch.mul_(unit).sum(dim=1) / length
        better = gain > most
        most = torch.where(better, gain, most)
        divisors = torch.where(better, divisor, divisors)
    numbers = (unit * divisors[:, None]).round_().clamp_(-8, 7)
    projected = (numbers * unit).sum(dim=1) / numbers.square().sum(dim=1).clamp_(min=1)
    return numbers, -extreme[:, 0] * projected
