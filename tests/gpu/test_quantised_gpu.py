"""Quantised weights on a CUDA device: made there and multiplied there, as on a CPU."""

import pytest
import torch

from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.quantise import dequantise, quantise
from mixfleet_engine.weight_formats import WeightFormat

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

FORMATS: list[WeightFormat] = ["int8", "int4", "fp8"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(48, 128), (70, 576), (1024, 2048)])
def test_a_weight_made_on_the_device_is_as_near_as_one_made_on_a_cpu(
    weight_format: WeightFormat, n: int, k: int
) -> None:
    matrix = random(n, k).bfloat16()
    here = dequantise(quantise(matrix, weight_format, "w"), torch.float32)
    there = quantise(matrix.cuda(), weight_format, "w")
    assert not isinstance(there, torch.Tensor)
    assert there.values.is_cuda
    assert there.scales.is_cuda
    found = dequantise(there, torch.float32).cpu()
    # Sums in another order may take another of two scales that are equally good.
    error, expected = ((x - matrix).square().mean().item() for x in (found, here))
    assert error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("num_rows", [1, 7, 64])
def test_a_product_is_the_one_of_the_cpu_reference(
    weight_format: WeightFormat, num_rows: int, dtype: torch.dtype
) -> None:
    weight = quantise(random(96, 576).cuda(), weight_format, "w")
    assert not isinstance(weight, torch.Tensor)
    on_cpu = type(weight)(values=weight.values.cpu(), scales=weight.scales.cpu())
    x = random(num_rows, 576, seed=1).to(dtype)
    expected = ReferenceOps().linear(on_cpu)(x.float())
    found = ReferenceOps().linear(weight)(x.cuda())
    assert found.dtype == dtype
    off = (found.float().cpu() - expected).abs().max() / expected.abs().max()
    assert off < {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
