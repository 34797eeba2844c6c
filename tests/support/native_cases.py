"""Weights in the native back-end's forms, and products written to be obviously right.

Shape letters: N outputs, K inputs, T rows.
"""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from mixfleet_engine.errors import NativeUnavailableError
from mixfleet_engine.ops.native.library import NativeLibrary, load_native
from mixfleet_engine.quantise import Int4Weight, Int8Weight, Weight

Form = Literal["bf16", "int8", "int4"]
FORMS: tuple[Form, ...] = ("bf16", "int8", "int4")
GROUP = 128


def native_library() -> NativeLibrary:
    """Return the library of this machine, or skip the test with the reason why there is none."""
    try:
        return load_native()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A weight and the matrix ``[N, K]`` fp32 that it stands for."""

    form: Form
    weight: Weight
    plain: Tensor

    def product(self, x: Tensor) -> Tensor:
        """Return ``[T, N]``: the product of the rounded activations in double precision."""
        return (rounded(x, self.form) @ self.plain.double().T).float()


def rounded(x: Tensor, form: Form) -> Tensor:
    """Return activations as the form's product sees them, in double precision."""
    if form == "bf16":
        return x.bfloat16().double()
    most = x.abs().amax(-1, keepdim=True)
    # In fp32 and by the inverse, so that numbers half way between two go the same way. torch
    # computes 127 / most as 127 * (1 / most), but a division of two tensors as one.
    inverse = torch.full_like(most, 127) / most
    numbers = torch.where(most > 0, (x * inverse).round(), 0)
    return numbers.double() * (most / 127)


def make_case(form: Form, n: int, k: int, seed: int = 0) -> Case:
    """Return a random weight of ``form`` with numbers of size ``k ** -0.5``."""
    plain = random(n, k, seed=seed) / k**0.5
    if form == "bf16":
        weight = plain.bfloat16()
        return Case(form=form, weight=weight, plain=weight.float())
    if form == "int8":
        scales = plain.abs().amax(1) / 127
        numbers = (plain / scales[:, None]).round()
        quantised: Weight = Int8Weight(values=numbers.to(torch.int8), scales=scales)
        return Case(form=form, weight=quantised, plain=numbers * scales[:, None])
    groups = -(-k // GROUP)
    scales = torch.rand(n, groups, generator=torch.Generator().manual_seed(seed)) / k**0.5
    numbers = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(seed + 1))
    pairs = (numbers[:, ::2] & 15) | (numbers[:, 1::2] & 15) << 4
    wide = scales.repeat_interleave(GROUP, dim=1)[:, :k]
    quantised = Int4Weight(values=pairs.to(torch.uint8), scales=scales)
    return Case(form=form, weight=quantised, plain=numbers * wide)
