"""Matrices as the kernels read them: E of one shape in one block of memory, one form for all.

**int4, int8.** Numbers share 16-bit words so that `unpack.py` needs no exchange between threads. A
group of 128 inputs of a row is 32 words of int4: word ``j`` has the inputs ``j``, ``j + 32``,
``j + 64`` and ``j + 96``, from its lowest bits up. Of int8 it is 64 words: word ``j`` has the
inputs ``j`` and ``j + 64``. The last group is filled up with zeros.

An int4 number is stored plus 8, so from 0 to 15; a checkpoint's own zero points take the place of
8. Its scales stand by group, then by row, for a kernel wants one group of all its rows at a time.

Shape letters: E matrices, N output width, K input width, G groups of 128 along K.
"""

from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.quantise import Fp8Weight, Int4Weight, Int8Weight, Weight, shape_of
from mixfleet_engine.weight_formats import INT4_GROUP

Form = Literal["plain", "fp8", "int8", "int4"]

WORDS: Final = {"int4": INT4_GROUP // 4, "int8": INT4_GROUP // 2}
"""16-bit words of 128 inputs of a row."""
OFFSET: Final = 8
"""What is added to an int4 number without a zero point of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """E matrices ``[N, K]``; made by `empty_packed`, filled by :meth:`put`."""

    form: Form
    n: int
    k: int
    values: Tensor
    """``[E, N, K]`` floating or float8_e4m3fn; int16 words: ``[E, N, 64 G]`` of int8, and
    ``[E, N, 32 G]`` of int4."""
    scales: Tensor | None
    """fp8, int8: ``[E, N]`` fp32. int4: ``[E, G, N]`` fp32."""
    zeros: Tensor | None
    """int4 with zero points: ``[E, G, N]`` fp32, whole numbers from 0 to 15."""

    @property
    def num_matrices(self) -> int:
        """E."""
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of all that a kernel may read."""
        parts = (self.values, self.scales, self.zeros)
        return sum(part.nbytes for part in parts if part is not None)

    def put(self, index: int, weight: Weight) -> None:
        """Copy a matrix to its place.

        Args:
            index: From 0 to E - 1.
            weight: ``[N, K]`` in this form.
        """
        assert shape_of(weight) == (self.n, self.k)
        if isinstance(weight, Tensor):
            self.values[index] = weight
            return
        assert self.scales is not None
        if not isinstance(weight, Int4Weight):
            is_int8 = isinstance(weight, Int8Weight)
            self.values[index] = _int8_words(weight.values) if is_int8 else weight.values
            self.scales[index] = weight.scales
            return
        self.values[index] = _int4_words(weight)
        self.scales[index] = weight.scales.T
        if self.zeros is not None:
            assert weight.zeros is not None
            self.zeros[index] = weight.zeros.T

    def dequantised(self, index: int) -> Tensor:
        """Return the matrix ``[N, K]`` that stands at ``index``, fp32."""
        values = self.values[index]
        if self.form == "plain":
            return values.float()
        assert self.scales is not None
        if self.form == "fp8":
            return values.float() * self.scales[index, :, None]
        groups = values.view(self.n, -1, WORDS[self.form])
        if self.form == "int8":
            numbers = torch.cat([groups << 8 >> 8, groups >> 8], dim=-1).float()  # [N, G, 128]
            return numbers.flatten(1)[:, : self.k] * self.scales[index, :, None]
        numbers = torch.cat([groups >> bits & 15 for bits in (0, 4, 8, 12)], dim=-1).float()
        zeros = OFFSET if self.zeros is None else self.zeros[index].T[:, :, None]
        matrix = (numbers - zeros) * self.scales[index].T[:, :, None]
        return matrix.flatten(1)[:, : self.k]


def empty_packed(num_matrices: int, like: Weight) -> PackedWeight:
    """Return room for so many matrices of the shape, form and device of ``like``."""
    n, k = shape_of(like)
    form, values = _form_of(like)
    device = values.device
    num_groups = -(-k // INT4_GROUP)
    in_words = form in WORDS
    shape = (num_matrices, n, num_groups * WORDS[form] if in_words else k)
    scale_shape = (num_matrices, num_groups, n) if form == "int4" else (num_matrices, n)
    has_zeros = isinstance(like, Int4Weight) and like.zeros is not None
    return PackedWeight(
        form=form,
        n=n,
        k=k,
        values=torch.empty(shape, dtype=torch.int16 if in_words else values.dtype, device=device),
        scales=None if form == "plain" else torch.empty(scale_shape, device=device),
        zeros=torch.empty(scale_shape, device=device) if has_zeros else None,
    )


def packed(*weights: Weight) -> PackedWeight:
    """Return these matrices, all of one form and shape."""
    found = empty_packed(len(weights), weights[0])
    for index, weight in enumerate(weights):
        found.put(index, weight)
    return found


def _form_of(weight: Weight) -> tuple[Form, Tensor]:
    match weight:
        case Tensor():
            return "plain", weight
        case Fp8Weight():
            return "fp8", weight.values
        case Int8Weight():
            return "int8", weight.values
        case Int4Weight():
            return "int4", weight.values


def _int4_words(weight: Int4Weight) -> Tensor:
    """Return the words ``[N, 32 G]`` of an int4 matrix."""
    n, width = weight.values.shape
    # Two's complement of four bits becomes the number plus 8 by its highest bit turned.
    flip = OFFSET if weight.zeros is None else 0
    numbers = torch.stack([weight.values & 15, weight.values >> 4], dim=-1).view(n, -1) ^ flip
    numbers = F.pad(numbers, (0, -(2 * width) % INT4_GROUP), value=flip)
    first, second, third, fourth = numbers.view(n, -1, 4, WORDS["int4"]).unbind(dim=2)
    halves = torch.stack([first | second << 4, third | fourth << 4], dim=-1)  # [N, G, 32, 2]
    return halves.view(torch.int16).view(n, -1)


def _int8_words(values: Tensor) -> Tensor:
    """Return the words ``[N, 64 G]`` of an int8 matrix."""
    n, k = values.shape
    numbers = F.pad(values, (0, -k % INT4_GROUP)).view(n, -1, 2, WORDS["int8"])
    return numbers.transpose(2, 3).contiguous().view(torch.int16).view(n, -1)
