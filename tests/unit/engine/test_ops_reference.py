"""The reference back-end's products: the dequantised matrix, and nothing else."""

import pytest
import torch

from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.quantise import dequantise, quantise
from mixfleet_engine.weight_formats import WeightFormat

FORMATS: list[WeightFormat] = ["plain", "int8", "int4", "fp8"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_linear_is_the_product_with_what_the_weight_stands_for(
    weight_format: WeightFormat, num_rows: int
) -> None:
    weight = quantise(random(24, 192), weight_format, "w")
    x = random(num_rows, 192, seed=1)
    expected = x.double() @ dequantise(weight, torch.float32).double().T
    found = ReferenceOps().linear(weight)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_linear_computes_in_the_dtype_of_the_activations(weight_format: WeightFormat) -> None:
    weight = quantise(random(24, 192).bfloat16(), weight_format, "w")
    x = random(3, 192, seed=1).bfloat16()
    expected = x.double() @ dequantise(weight, torch.bfloat16).double().T
    found = ReferenceOps().linear(weight)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.01, atol=0.1)
