"""The PTX that takes words apart, carried out on the CPU instruction by instruction.

The interpreter has no PTX: there the kernels' tests go the plain way. So here every word is tried.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.unpack import INT4_PTX, INT8_PTX

WORDS = torch.arange(1 << 16)
OTHERS = WORDS.flip(0) ^ 0x5A5A
"""What lies in the upper half of the register of each of ``WORDS``; every word again."""


def bf16_halves(register: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two bf16 numbers of registers, fp64."""
    upper = (register << 16 & 0xFFFFFFFF, register & 0xFFFF0000)
    low, high = (half.to(torch.int32).view(torch.float32).double() for half in upper)
    return low, high


def bf16_bits(numbers: Tensor) -> Tensor:
    rounded = numbers.to(torch.bfloat16)
    assert torch.equal(rounded.double(), numbers), "a result is not exact"
    return rounded.view(torch.int16).long() & 0xFFFF


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    parts = zip(bf16_halves(a), bf16_halves(b), bf16_halves(c), strict=True)
    low, high = (bf16_bits(x * y + z) for x, y, z in parts)
    return low | high << 16


def lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    """Return bit by bit what ``table`` holds at the place ``4 a + 2 b + c``."""
    found = torch.zeros_like(a)
    for place in range(8):
        if int(table) >> place & 1:
            parts = [x if place & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            found |= parts[0] & parts[1] & parts[2]
    return found & 0xFFFFFFFF


INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "lop3.b32": lop3,
    "shr.u32": lambda a, bits: a >> bits,
    "mov.b32": lambda a: a,
    "fma.rn.bf16x2": fma,
}


def carried_out(ptx: str, num_outputs: int, word: Tensor) -> list[Tensor]:
    registers: dict[str, Tensor] = {f"${num_outputs}": word}
    for line in re.findall(r"[^{};]+;", ptx):
        name, *arguments = re.split(r"[\s,]+", line.strip().rstrip(";"))
        if name == ".reg":
            continue
        target, *sources = arguments
        registers[target] = INSTRUCTIONS[name](
            *(registers[at] if at in registers else torch.tensor(int(at, 0)) for at in sources)
        )
    return [registers[f"${number}"] for number in range(num_outputs)]


def test_the_ptx_of_int4_gives_128_and_the_four_numbers() -> None:
    found = carried_out(INT4_PTX.value, 4, WORDS | OTHERS << 16)
    for number, register in enumerate(found):
        low, high = bf16_halves(register)
        assert torch.equal(low, 128.0 + (WORDS >> 4 * number & 15))
        assert torch.equal(high, 128.0 + (OTHERS >> 4 * number & 15))


def test_the_ptx_of_int8_gives_the_two_numbers() -> None:
    found = carried_out(INT8_PTX.value, 2, WORDS | OTHERS << 16)
    for number, register in enumerate(found):
        for half, words in zip(bf16_halves(register), (WORDS, OTHERS), strict=True):
            wanted = (words >> 8 * number & 255).to(torch.uint8).view(torch.int8)
            assert torch.equal(half, wanted.double())
