"""Matrices as the kernels read them stand for what the quantised ones stand for."""

import pytest
import torch

from mixfleet_engine.ops.cuda.packed import empty_packed, packed
from mixfleet_engine.quantise import Int4Weight, Weight, dequantise, quantise
from mixfleet_engine.weight_formats import WeightFormat
from support.kernels import randint, randn

FORMATS: list[WeightFormat] = ["plain", "fp8", "int8", "int4"]


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("k", [128, 192, 34, 640])
def test_packing_changes_no_number(weight_format: WeightFormat, k: int) -> None:
    weights = [quantise(randn(6, k, seed=seed), weight_format, "w") for seed in range(3)]
    found = packed(*weights)
    assert (found.num_matrices, found.n, found.k) == (3, 6, k)
    for index, weight in enumerate(weights):
        assert torch.equal(found.dequantised(index), dequantise(weight, torch.float32))


def test_zero_points_are_kept() -> None:
    weight = Int4Weight(
        values=randint(0, 256, 5, 96, seed=1).to(torch.uint8),
        scales=randn(5, 2, seed=2),
        zeros=randint(0, 16, 5, 2, seed=3).float(),
    )
    assert torch.equal(packed(weight).dequantised(0), dequantise(weight, torch.float32))


def test_a_place_is_filled_by_itself() -> None:
    first, second = (quantise(randn(4, 256, seed=seed), "int4", "w") for seed in (1, 2))
    found = empty_packed(2, first)
    found.put(1, second)
    found.put(0, first)
    for index, weight in enumerate([first, second]):
        assert torch.equal(found.dequantised(index), dequantise(weight, torch.float32))


def test_int4_takes_half_a_byte_a_number_and_its_scales() -> None:
    weight: Weight = quantise(randn(64, 4096, seed=0), "int4", "w")
    assert packed(weight).nbytes == 64 * (4096 // 2 + 4 * 4096 // 128)
