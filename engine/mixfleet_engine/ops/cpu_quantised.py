"""Products with quantised weights on a CPU, where the native back-end is not.

torch has two private operations that multiply with weights as they are stored: they read fewer
bytes than bf16 and need no second copy. One operation serves every number of rows, so a row's
result does not depend on the rows beside it. Everything else is dequantised at each call.

Shape letters: T rows of activations, N output width, K input width, G groups of 128 along K.
"""

import logging
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.ops.door import Linear
from mixfleet_engine.quantise import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    Quantised,
    dequantise,
    quantise,
    rows_of,
    shape_of,
    slabs,
    unpack_nibbles,
)
from mixfleet_engine.weight_formats import INT4_GROUP, WeightFormat

logger = logging.getLogger(__name__)

QuantisedPacker = Callable[[Quantised, torch.dtype], Linear]
"""Weight and dtype of the activations -> product."""

ALLOWED: Final[Mapping[torch.dtype, float]] = MappingProxyType(
    {torch.float32: 1e-5, torch.bfloat16: 0.02}
)
"""Largest difference of the self-check, of the largest output. In bf16 scale and output are
rounded, 0.004 each."""
INT8_INPUTS: Final = 32
"""The int8 operation needs a multiple of as many inputs: it reads whole vectors, beyond the end of
others."""
INT4_OUTPUTS: Final = 16
"""The int4 operation takes multiples of as many outputs."""
INT4_SMALLEST_GROUP: Final = 32


def dequantise_slabs(weight: Quantised, dtype: torch.dtype) -> Linear:
    """Return the product with ``weight``, some rows of which are dequantised at a time.

    Slow, but right for any form and shape, and without a second copy of the weights.
    """
    n, k = shape_of(weight)
    del dtype  # that of the activations counts

    def linear(x: Tensor) -> Tensor:
        parts = [F.linear(x, dequantise(rows_of(weight, rows), x.dtype)) for rows in slabs(n, k)]
        return torch.cat(parts, dim=-1)

    return linear


def pack_int8(weight: Quantised, dtype: torch.dtype) -> Linear:
    """Return the product with an int8 weight; it keeps the weight's own numbers.

    A shape that the operation does not take is dequantised at each call.
    """
    assert isinstance(weight, Int8Weight)
    if shape_of(weight)[1] % INT8_INPUTS:
        return dequantise_slabs(weight, dtype)
    values, scales = weight.values.contiguous(), weight.scales.to(dtype)
    multiply = torch.ops.aten._weight_int8pack_mm.default

    def linear(x: Tensor) -> Tensor:
        product: Tensor = multiply(x.contiguous(), values, scales)
        return product

    return linear


def pack_int4(weight: Quantised, dtype: torch.dtype) -> Linear:
    """Return the product with an int4 weight, laid out anew; the caller drops the original.

    Where K ends inside a group, all groups are cut into parts that fit, with equal scales. A shape
    that the operation does not take is dequantised at each call.
    """
    assert isinstance(weight, Int4Weight)
    n, k = shape_of(weight)
    group = math.gcd(INT4_GROUP, k)
    if n % INT4_OUTPUTS or group < INT4_SMALLEST_GROUP:
        return dequantise_slabs(weight, dtype)
    values = torch.empty(n, k // 2, dtype=torch.uint8)
    for rows in slabs(n, k):
        numbers = unpack_nibbles(weight.values[rows]).int()
        if weight.zeros is None:
            numbers ^= 8  # from two's complement to -8 at 0
        values[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    # To (q - 8) * scale the operation adds what zero stands at: [K / group, N, 2].
    scales = weight.scales
    offsets = torch.zeros_like(scales) if weight.zeros is None else (8 - weight.zeros) * scales
    scales_and_zeros = torch.stack((scales, offsets), dim=-1)
    parts = scales_and_zeros.repeat_interleave(INT4_GROUP // group, dim=1)[:, : k // group]
    scales_and_zeros = parts.transpose(0, 1).contiguous().to(dtype)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def linear(x: Tensor) -> Tensor:
        product: Tensor = multiply(x.contiguous(), values, group, scales_and_zeros)
        return product

    return linear


PACKERS: Final[Mapping[type[Quantised], QuantisedPacker]] = MappingProxyType(
    {Int8Weight: pack_int8, Int4Weight: pack_int4, Fp8Weight: dequantise_slabs}
)
_FORMATS: Final[Mapping[type[Quantised], WeightFormat]] = MappingProxyType(
    {Int8Weight: "int8", Int4Weight: "int4", Fp8Weight: "fp8"}
)


def checked_quantised_packer(
    form: type[Quantised], dtype: torch.dtype, packer: QuantisedPacker | None = None
) -> QuantisedPacker:
    """Return ``packer`` if it works here, else :func:`dequantise_slabs` with a warning.

    Private operations may be missing, refuse this CPU or change; a small product tells.

    Args:
        form: Of the weights.
        dtype: Of the activations.
        packer: None: the one in ``PACKERS``.
    """
    packer = packer or PACKERS[form]
    name = _FORMATS[form]
    try:
        off = _difference(name, dtype, packer)
    except (AttributeError, RuntimeError, TypeError) as error:
        logger.warning("%s weights are dequantised at each step: %s", name, error)
        return dequantise_slabs
    if off <= ALLOWED[dtype]:  # false for a NaN
        return packer
    logger.warning(
        "%s weights are dequantised at each step: off by %g, allowed %g", name, off, ALLOWED[dtype]
    )
    return dequantise_slabs


def _difference(name: WeightFormat, dtype: torch.dtype, packer: QuantisedPacker) -> float:
    """Return the largest difference from the plain product, of the largest output."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(80, 2 * INT4_GROUP + 64, generator=generator)
    weight = quantise(matrix, name, "self-check")
    assert not isinstance(weight, Tensor)
    x = torch.randn(5, matrix.shape[1], generator=generator).to(dtype)
    expected = F.linear(x.float(), dequantise(weight, torch.float32))
    found = packer(weight, dtype)(x).float()
    return ((found - expected).abs().max() / expected.abs().max()).item()
