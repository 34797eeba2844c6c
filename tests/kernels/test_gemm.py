"""Products of step and weights against plain torch with the numbers that the weights stand for."""

import pytest
import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.align import align
from mixfleet_engine.ops.cuda.gemm import dense, dense_up, experts_down, experts_up
from mixfleet_engine.ops.cuda.packed import PackedWeight, packed
from mixfleet_engine.ops.cuda.quant import Rows, quantise_rows
from mixfleet_engine.ops.cuda.tiles import Tiles
from mixfleet_engine.quantise import Int4Weight, quantise
from mixfleet_engine.weight_formats import WeightFormat
from support.kernels import DEVICE, off, randint, randn

FORMS = ["plain", "fp8", "fp8 x fp8", "int8", "int4", "int4 with zeros"]
ALLOWED = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
F32 = torch.float32


def weights(form: str, count: int, n: int, k: int, dtype: torch.dtype, seed: int) -> PackedWeight:
    matrices = [randn(n, k, seed=seed + number) for number in range(count)]
    if form == "plain":
        return packed(*[matrix.to(dtype) for matrix in matrices])
    kinds: dict[str, WeightFormat] = {"fp8": "fp8", "int8": "int8", "int4": "int4"}
    found = [quantise(matrix, kinds[form.partition(" ")[0]], "w") for matrix in matrices]
    if form.endswith("zeros"):
        found = [
            Int4Weight(
                values=weight.values,
                scales=weight.scales,
                zeros=randint(0, 16, *weight.scales.shape, seed=seed).float(),
            )
            for weight in found
            if isinstance(weight, Int4Weight)
        ]
    return packed(*found)


def rows(form: str, num_rows: int, k: int, dtype: torch.dtype, seed: int) -> tuple[Rows, Tensor]:
    """Return rows as the kernel takes them, and what they stand for in fp32."""
    x = randn(num_rows, k, seed=seed, dtype=dtype)
    if form != "fp8 x fp8":
        return x, x.float()
    quantised = quantise_rows(x)
    return quantised, quantised.values.float() * quantised.scales[:, None]


def tiles(block_t: int = 16, block_n: int = 64, group: int = 2) -> Tiles:
    return Tiles(block_n=block_n, block_t=block_t, group=group, num_warps=4, num_stages=3)


def swiglu(product: Tensor) -> Tensor:
    gate, up = product.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dense_product(form: str, dtype: torch.dtype) -> None:
    for seed, (num_rows, n, k) in enumerate([(1, 96, 128), (17, 70, 256), (40, 128, 192)]):
        weight = weights(form, 1, n, k, dtype, seed)
        x, plain = rows(form, num_rows, k, dtype, seed)
        expected = plain @ weight.dequantised(0).T
        assert off(dense(x, weight, tiles(), dtype=F32), expected) < 2e-6
        assert off(dense(x, weight, tiles(), dtype=dtype), expected) < ALLOWED[dtype]
        assert off(dense_up(x, weight, tiles(), dtype=F32), swiglu(expected)) < 4e-6


def test_a_product_may_be_added_to_the_running_sum() -> None:
    weight = weights("plain", 1, 96, 128, torch.bfloat16, 0)
    x, plain = rows("plain", 19, 128, torch.bfloat16, 1)
    total = randn(19, 96, seed=2)
    expected = total + plain @ weight.dequantised(0).T
    assert dense(x, weight, tiles(), add_to=total) is total
    assert off(total, expected) < 2e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_t", [16, 32])
def test_every_pair_of_token_and_expert_gets_its_experts_product(form: str, block_t: int) -> None:
    dtype, experts, width, hidden = torch.bfloat16, 5, 128, 96
    up = weights(form, experts, 2 * hidden, width, dtype, 0)
    down = weights(form, experts, width, hidden, dtype, 9)
    for num_rows in (1, 37):
        # Expert 2 has no tokens, expert 4 has all: more than a tile.
        chosen = torch.stack(
            [torch.full((num_rows,), 4, device=DEVICE), randint(0, 2, num_rows, seed=num_rows)], 1
        ).int()
        alignment = align(chosen, experts, block_t)
        x, plain = rows(form, num_rows, width, dtype, num_rows)
        h, plain_h = rows(form, 2 * num_rows, hidden, dtype, num_rows + 1)
        pairs = [(token, int(chosen[token, k])) for token in range(num_rows) for k in range(2)]
        expected = torch.stack([swiglu(plain[t] @ up.dequantised(e).T) for t, e in pairs])
        found = experts_up(x, up, alignment, tiles(block_t), dtype=F32)
        assert off(found, expected) < 4e-6
        expected = torch.stack(
            [plain_h[pair] @ down.dequantised(e).T for pair, (_, e) in enumerate(pairs)]
        )
        assert off(experts_down(h, down, alignment, tiles(block_t), dtype=F32), expected) < 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_a_token_has_the_same_bits_alone_and_among_others(form: str) -> None:
    dtype, experts, width, hidden = torch.bfloat16, 4, 128, 64
    up = weights(form, experts, 2 * hidden, width, dtype, 0)
    x, _ = rows(form, 41, width, dtype, 1)
    chosen = torch.stack([randint(0, 2, 41, seed=1), 2 + randint(0, 2, 41, seed=2)], dim=1).int()
    many = experts_up(x, up, align(chosen, experts, 32), tiles(32), dtype=dtype)
    for token in (0, 17, 40):
        one = slice(token, token + 1)
        row = type(x)(x.values[one], x.scales[one]) if isinstance(x, tuple) else x[one]
        alone = experts_up(
            row, up, align(chosen[one], experts, 16), tiles(16, group=1), dtype=dtype
        )
        assert torch.equal(alone, many[2 * token : 2 * token + 2])


def test_rows_of_nan_spoil_no_other_row() -> None:
    weight = weights("int4", 1, 64, 128, torch.bfloat16, 0)
    x = randn(5, 128, seed=1, dtype=torch.bfloat16)
    clean = dense(x, weight, tiles(), dtype=F32)
    x[0] = float("nan")
    found = dense(x, weight, tiles(), dtype=F32)
    assert found[0].isnan().all()
    assert torch.equal(found[1:], clean[1:])
