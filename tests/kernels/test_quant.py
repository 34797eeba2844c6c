import pytest
import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.quant import quantise_rows
from support.kernels import DEVICE, randn


def plainly_quantised(h: Tensor) -> tuple[Tensor, Tensor]:
    wide = h.float()
    largest = wide.abs().amax(dim=1)
    # A number over a tensor would be the tensor's inverse, rounded, times the number.
    inverse = torch.where(largest > 0, torch.full_like(largest, 448) / largest, 0.0)
    return (wide * inverse[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), largest / 448


def assert_same_rows(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)
    values, wanted = found[0].float(), expected[0].float()
    # An inverse one bit off may turn a number that lies between two of e4m3 to either.
    other = values != wanted
    assert other.sum() <= max(1, values.numel() // 1000)
    torch.testing.assert_close(values, wanted, rtol=0.13, atol=2**-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (3, 96), (17, 128), (5, 1000)])
def test_rows_are_quantised_as_torch_would(num_rows: int, width: int, dtype: torch.dtype) -> None:
    h = randn(num_rows, width, dtype=dtype)
    assert_same_rows(quantise_rows(h), plainly_quantised(h))


def test_every_number_of_fp8_and_those_between_are_rounded_as_torch_rounds() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    between = (numbers[1:] + numbers[:-1]) / 2
    row = torch.cat((numbers, between, between * 1.001, between * 0.999))[None].to(DEVICE)
    values, scales = quantise_rows(row)
    assert scales.tolist() == [1.0]
    assert torch.equal(values.float(), row.to(torch.float8_e4m3fn).float())


def test_the_largest_number_of_a_row_never_leaves_the_range() -> None:
    h = randn(200, 64) * torch.logspace(-30, 30, 200, device=DEVICE)[:, None]
    values, _ = quantise_rows(h)
    assert values.float().abs().amax(dim=1).eq(448).all()


def test_a_row_of_zeros_has_scale_zero() -> None:
    h = randn(3, 64)
    h[1] = 0
    values, scales = quantise_rows(h)
    assert scales[1] == 0
    assert (values[1].float() == 0).all()
    assert (scales[[0, 2]] > 0).all()


def test_a_row_with_a_number_that_is_none_shows_it() -> None:
    h = randn(2, 64)
    h[1, 5] = float("nan")
    values, scales = quantise_rows(h)
    stands_for = values.float() * scales[:, None]
    assert stands_for[0].isfinite().all()
    assert stands_for[1, 5].isnan()


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    h = randn(9, 320, dtype=torch.bfloat16)
    values, scales = quantise_rows(h)
    alone = quantise_rows(h[4:5])
    assert torch.equal(alone.values.view(torch.uint8), values[4:5].view(torch.uint8))
    assert torch.equal(alone.scales, scales[4:5])


def test_no_rows_are_quantised_to_none() -> None:
    values, scales = quantise_rows(randn(0, 64))
    assert values.shape == (0, 64)
    assert scales.shape == (0,)
