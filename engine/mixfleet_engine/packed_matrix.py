"""A matrix as AWQ and GPTQ files hold it, or a cut of it, and what the engine makes of that.

Both store the transpose: K inputs down, N outputs across, so that scales ``[G, N]`` are rows of
it. AWQ's ``qweight`` ``[K, N / 8]`` packs neighbouring outputs, and the nibbles of a word, lowest
first, are its outputs 0 2 4 6 1 3 5 7. GPTQ's ``[K / 8, N]`` packs neighbouring inputs in their
order. ``qzeros`` ``[G, N / 8]`` packs outputs in both, in AWQ with the same order. GPTQ's ``g_idx``
``[K]`` names each input's group; without it they are neighbours.

Shape letters: N output width, K input width, G groups along K, W words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import torch
from torch import Tensor

from mixfleet_engine.errors import CheckpointError, ConfigError
from mixfleet_engine.packed_format import CONVERT, OWN_GROUP, PackedFormat
from mixfleet_engine.quantise import Int4Weight

_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_WORD_MASK: Final = (1 << 32) - 1
_SLAB_INPUTS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """Rows and columns of one matrix ``[N, K]``, still as the files have them.

    A cut through a word brings the whole word; ``skip`` says how much of it is somebody else's.
    """

    name: str
    """Of the weight, for errors."""
    layout: PackedFormat
    n: int
    k: int
    qweight: Tensor
    """int32: AWQ ``[K, W]``, GPTQ ``[W, N]``."""
    qweight_skip: int
    """Numbers before the first of the cut, along the packed axis."""
    qzeros: Tensor
    """``[G, W]`` int32."""
    qzeros_skip: int
    scales: Tensor
    """``[G, N]``, any floating dtype."""
    groups: Tensor
    """``[K]``: the row of ``scales`` and ``qzeros`` of each input."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What was read."""
        return self.qweight, self.qzeros, self.scales, self.groups

    def moved(self, move: Callable[[Tensor], Tensor]) -> Self:
        """Return the same with each tensor where ``move`` puts it."""
        qweight, qzeros, scales, groups = map(move, self.tensors)
        return replace(self, qweight=qweight, qzeros=qzeros, scales=scales, groups=groups)

    @property
    def int4_problem(self) -> str | None:
        """Why the engine's own int4 cannot hold these numbers as they are; None: it can."""
        if self.layout.problem is not None:
            return self.layout.problem
        heads = self.groups[::OWN_GROUP].repeat_interleave(OWN_GROUP)
        if self.k % 2 or not torch.equal(heads[: self.k], self.groups):
            return (
                f"not {OWN_GROUP} neighbouring inputs each share a scale (desc_act orders them "
                "anew, or a rank's share cuts a group)"
            )
        return None

    def int4(self) -> Int4Weight:
        """Return exactly the same numbers in the engine's own form.

        Raises:
            ConfigError: They do not fit it.
            CheckpointError: Zero points vary although ``config.json`` denies it.
        """
        if self.int4_problem is not None:
            raise ConfigError(f"{self.name}: {self.int4_problem}; {CONVERT}")
        heads = self.groups[::OWN_GROUP]
        zeros = self._zeros()[heads]
        numbers = self._numbers(slice(0, self.k))  # [K, N]
        values = (numbers[::2] | (numbers[1::2] << 4)).T.contiguous()
        scales = self.scales[heads].T.float().contiguous()
        if self.layout.has_zeros:
            return Int4Weight(values=values, scales=scales, zeros=zeros.T.float().contiguous())
        if not bool((zeros == 8).all()):
            raise CheckpointError(
                f"{self.name}: zero points differ from 8, but config.json calls them symmetric; "
                f"{CONVERT}"
            )
        return Int4Weight(values=values ^ 0x88, scales=scales)  # 0 to 15 become -8 to 7

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix ``[N, K]`` that the numbers stand for, rounded once to ``dtype``."""
        matrix = torch.empty(self.k, self.n, dtype=dtype, device=self.qweight.device)
        zeros, scales = self._zeros().float(), self.scales.float()
        # Some inputs at a time: the scratch is four bytes and more a number.
        for start in range(0, self.k, _SLAB_INPUTS):
            part = slice(start, min(start + _SLAB_INPUTS, self.k))
            groups = self.groups[part]
            matrix[part] = (self._numbers(part) - zeros[groups]) * scales[groups]
        return matrix.T.contiguous()

    def _numbers(self, inputs: slice) -> Tensor:
        """Return these inputs' numbers, ``[inputs, N]`` uint8, never negative."""
        if self.layout.method == "awq":
            words = _unpacked(self.qweight[inputs], self.layout.bits, _AWQ_ORDER)
            return words[:, self.qweight_skip :][:, : self.n]
        per_word = self.layout.per_word
        start, stop = inputs.start + self.qweight_skip, inputs.stop + self.qweight_skip
        first = start // per_word
        words = self.qweight[first : -(-stop // per_word)]
        numbers = _unpacked(words.T, self.layout.bits, range(per_word)).T
        return numbers[start - first * per_word :][: inputs.stop - inputs.start]

    def _zeros(self) -> Tensor:
        """Return the zero points, ``[G, N]`` uint8."""
        words = self.qzeros
        order: Sequence[int] = range(self.layout.per_word)
        if self.layout.method == "awq":
            order = _AWQ_ORDER
        if self.layout.stores_zeros_less_one:
            # The 1 was taken off whole words, so a zero point of 0 borrowed from its neighbour.
            ones = sum(1 << self.layout.bits * place for place in order)
            words = (words.long() + ones) & _WORD_MASK
        zeros = _unpacked(words, self.layout.bits, order)
        return zeros[:, self.qzeros_skip :][:, : self.n]


def _unpacked(words: Tensor, bits: int, order: Sequence[int]) -> Tensor:
    """Return ``[R, W * len(order)]`` uint8 of words ``[R, W]``.

    Args:
        words: Integers, of which the low 32 bits count.
        bits: Of a number.
        order: Place in the word's own span of the number in the lowest bits, in the next, ...
    """
    rows, num_words = words.shape
    numbers = words.new_empty((rows, num_words * len(order)), dtype=torch.uint8)
    mask = (1 << bits) - 1
    for shift, place in enumerate(order):
        numbers[:, place :: len(order)] = (words >> (bits * shift)) & mask
    return numbers
