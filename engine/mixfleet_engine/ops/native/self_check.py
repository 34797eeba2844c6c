"""Whether the compiled library computes what it should: a small product in each format."""

from typing import Final

import torch
from torch import Tensor

from mixfleet_engine.errors import NativeUnavailableError
from mixfleet_engine.ops.native.library import NativeLibrary
from mixfleet_engine.ops.native.linear import NativeLinear
from mixfleet_engine.quantise import Int4Weight, Int8Weight, Weight

ROWS: Final = 13
"""More than one block of rows."""
INPUTS: Final = 256
OUTPUTS: Final = 48
"""A panel and a half."""
ALLOWED: Final = 0.03
"""Of the largest number; activations in 8 bits are off by 0.01."""


def check(library: NativeLibrary) -> None:
    """Return if the library multiplies like torch.

    Raises:
        NativeUnavailableError: It does not; the text says in which format and by how much.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, INPUTS, generator=generator)
    for name, (weight, plain) in _cases(generator).items():
        expected = x @ plain.T
        found = NativeLinear(weight, library, threads=1)(x)
        off = ((found - expected).abs().max() / expected.abs().max()).item()
        # Written this way round a NaN is refused too.
        if not off <= ALLOWED:
            raise NativeUnavailableError(
                f"{library.path} multiplies wrongly in {name}: off by {off:.3g}, allowed {ALLOWED}"
            )


def _cases(generator: torch.Generator) -> dict[str, tuple[Weight, Tensor]]:
    """Return a weight in each format with the matrix ``[N, K]`` fp32 that it stands for."""
    plain = torch.randn(OUTPUTS, INPUTS, generator=generator).bfloat16()
    scales = torch.rand(OUTPUTS, generator=generator) + 0.5
    bytes_ = torch.randint(-127, 128, (OUTPUTS, INPUTS), generator=generator)
    group_scales = torch.rand(OUTPUTS, INPUTS // 128, generator=generator) + 0.5
    nibbles = torch.randint(-8, 8, (OUTPUTS, INPUTS), generator=generator)
    packed = (nibbles[:, ::2] & 15) | (nibbles[:, 1::2] & 15) << 4
    return {
        "bf16": (plain, plain.float()),
        "int8": (
            Int8Weight(values=bytes_.to(torch.int8), scales=scales),
            bytes_ * scales[:, None],
        ),
        "int4": (
            Int4Weight(values=packed.to(torch.uint8), scales=group_scales),
            nibbles * group_scales.repeat_interleave(128, dim=1),
        ),
    }
