"""Quantised weights: how near they come, what they refuse, and what they stand for."""

import itertools
from typing import get_args

import pytest
import torch

from mixfleet_engine import quantise as quantise_module
from mixfleet_engine.errors import CheckpointError, ConfigError
from mixfleet_engine.quantise import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    Weight,
    dequantise,
    form_of,
    quantise,
    rows_of,
    shape_of,
    slabs,
    stacked,
    unpack_int4,
)
from mixfleet_engine.weight_formats import WeightFormat, stored_bytes

FORMATS: list[WeightFormat] = ["int8", "int4", "fp8"]
FORMS = {"int8": Int8Weight, "int4": Int4Weight, "fp8": Fp8Weight}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    assert not isinstance(weight, torch.Tensor)
    return weight.values, weight.scales


def squared_error(matrix: torch.Tensor, weight_format: WeightFormat) -> float:
    stands_for = dequantise(quantise(matrix, weight_format, "w"), torch.float32)
    return (stands_for - matrix).square().sum().item()


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_every_format_has_a_form() -> None:
    assert {*FORMATS, "plain"} == set(get_args(WeightFormat))
    for weight_format in FORMATS:
        assert isinstance(quantise(random(4, 128), weight_format, "w"), FORMS[weight_format])


def test_a_plain_weight_is_handed_back() -> None:
    matrix = random(3, 5).bfloat16()
    assert quantise(matrix, "plain", "w") is matrix
    assert torch.equal(dequantise(matrix, torch.float32), matrix.float())


def test_int8_is_rounded_to_the_nearest_of_255_steps_of_its_row() -> None:
    matrix = random(7, 50)
    values, scales = parts(quantise(matrix, "int8", "w"))
    for row, found, scale in zip(matrix.tolist(), values.tolist(), scales.tolist(), strict=True):
        largest = max(abs(number) for number in row)
        assert scale == pytest.approx(largest / 127, rel=1e-6)
        assert max(abs(number) for number in found) == 127
        for number, step in zip(row, found, strict=True):
            assert abs(number - step * scale) <= 0.5001 * scale


def test_fp8_is_rounded_to_the_nearest_number_of_the_format() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    matrix = random(5, 64)
    values, scales = parts(quantise(matrix, "fp8", "w"))
    torch.testing.assert_close(scales, matrix.abs().amax(1) / 448)
    for row in range(5):
        distance = (matrix[row, :, None] / scales[row] - every).abs()
        chosen = (matrix[row] / scales[row] - values[row].float()).abs()
        torch.testing.assert_close(chosen, distance.amin(1), rtol=0, atol=1e-4)
    assert values.float().abs().max() == 448


def test_int4_is_at_least_as_near_as_an_exhaustive_search_with_symmetric_scales() -> None:
    matrix = random(16, 256)
    groups = matrix.view(-1, 128)
    best = torch.full((len(groups),), float("inf"))
    for steps, factor in itertools.product((7, 8), torch.linspace(0.6, 1, 20).tolist()):
        scales = groups.abs().amax(1, keepdim=True) * factor / steps
        rounded = (groups / scales).round().clamp(-8, 7) * scales
        best = torch.minimum(best, (rounded - groups).square().sum(1))
    assert squared_error(matrix, "int4") < 0.95 * best.sum().item()


def test_no_other_scale_of_the_same_int4_numbers_is_nearer() -> None:
    groups = random(40, 128)
    values, scales = parts(quantise(groups, "int4", "w"))
    numbers = unpack_int4(values).float()

    def error(factor: float) -> torch.Tensor:
        return (numbers * scales * factor - groups).square().sum(1)

    for factor in (0.98, 0.999, 1.001, 1.02):
        assert (error(1) <= error(factor)).all()


@pytest.mark.parametrize("steps", [7, 8])
def test_what_int4_can_hold_comes_back_as_it_was(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-7, 8, (6, 384), generator=generator)
    numbers[:, ::128] = -steps
    matrix = numbers.view(-1, 128) * (torch.rand(18, 1, generator=generator) + 0.5)
    matrix = matrix.view(6, 384)
    for sign in (1, -1):
        found = dequantise(quantise(sign * matrix, "int4", "w"), torch.float32)
        torch.testing.assert_close(found, sign * matrix)


def test_nibbles_lie_with_the_even_input_low() -> None:
    values = torch.tensor([[0x21, 0xF8, 0x7E]], dtype=torch.uint8)
    assert unpack_int4(values).tolist() == [[1, 2, -8, -1, -2, 7]]


def with_zeros(n: int, k: int) -> tuple[Int4Weight, torch.Tensor]:
    """A random matrix with zero points, and what it stands for, number by number."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 16, (n, k), generator=generator)
    num_groups = -(-k // 128)
    zeros = torch.randint(0, 16, (n, num_groups), generator=generator).float()
    scales = torch.rand(n, num_groups, generator=generator)
    values = (numbers[:, ::2] | numbers[:, 1::2] << 4).to(torch.uint8)
    meant = torch.tensor(
        [
            [(numbers[i, j] - zeros[i, j // 128]) * scales[i, j // 128] for j in range(k)]
            for i in range(n)
        ]
    )
    return Int4Weight(values=values, scales=scales, zeros=zeros), meant


def test_with_zero_points_int4_numbers_are_unsigned() -> None:
    weight, meant = with_zeros(5, 200)
    assert torch.equal(dequantise(weight, torch.float32), meant)
    assert torch.equal(dequantise(rows_of(weight, slice(1, 4)), torch.float32), meant[1:4])
    both = stacked([weight, rows_of(weight, slice(2, 3))])
    assert torch.equal(dequantise(both, torch.float32), torch.cat([meant, meant[2:3]]))


def test_zero_points_make_a_form_of_their_own() -> None:
    weight, meant = with_zeros(4, 128)
    assert form_of(weight) == "Int4Weight with zero points"
    assert form_of(quantise(meant, "int4", "w")) == "Int4Weight"
    assert form_of(meant) == "plain float32"


@pytest.mark.parametrize("weight_format", ["int8", "int4", "fp8"])
def test_slabs_for_a_gpu_change_no_bit(
    weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = random(300, 256)
    whole = parts(quantise(matrix, weight_format, "w"))
    monkeypatch.setattr(quantise_module, "SLAB_NUMBERS", 1)
    slabbed = parts(quantise(matrix, weight_format, "w"))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, slabbed, strict=True))


def test_a_gpu_gets_fewer_and_larger_slabs() -> None:
    on_gpu = list(slabs(14_336, 4096, torch.device("cuda")))
    assert len(on_gpu) == 4
    assert [rows.start for rows in on_gpu[1:]] == [rows.stop for rows in on_gpu[:-1]]
    assert len(list(slabs(14_336, 4096, torch.device("cpu")))) == 112


def test_every_int4_number_is_packed_and_unpacked() -> None:
    # One group whose largest is -8 steps, and which has every other number too.
    matrix = torch.arange(-8, 8).repeat(8)[None].float() / 4
    values, scales = parts(quantise(matrix, "int4", "w"))
    assert unpack_int4(values).tolist() == (matrix * 4).int().tolist()
    torch.testing.assert_close(scales, torch.tensor([[0.25]]))


@pytest.mark.parametrize("k", [2, 96, 128, 130, 576])
def test_the_last_group_of_int4_may_be_short(k: int) -> None:
    matrix = random(5, k)
    weight = quantise(matrix, "int4", "w")
    values, scales = parts(weight)
    assert values.shape == (5, k // 2)
    assert scales.shape == (5, -(-k // 128))
    assert shape_of(weight) == (5, k)
    for group in range(scales.shape[1]):
        columns = slice(group * 128, min(k, (group + 1) * 128))
        alone = quantise(matrix[:, columns].contiguous(), "int4", "w")
        found = dequantise(weight, torch.float32)[:, columns]
        assert torch.equal(found, dequantise(alone, torch.float32))


def test_int4_refuses_an_odd_width_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"layers.3.x: int4 .*K=33; use int8 or fp8"):
        quantise(random(4, 33), "int4", "layers.3.x")


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_is_quantised_from_its_own_numbers(
    weight_format: WeightFormat, dtype: torch.dtype
) -> None:
    matrix = random(6, 256).to(dtype)
    found = parts(quantise(matrix, weight_format, "w"))
    expected = parts(quantise(matrix.float(), weight_format, "w"))
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_weight_stands_for_is_rounded_once(
    weight_format: WeightFormat, dtype: torch.dtype
) -> None:
    weight = quantise(random(6, 192), weight_format, "w")
    values, scales = parts(weight)
    if weight_format == "int4":
        wide = unpack_int4(values).double() * scales.double().repeat_interleave(128, 1)[:, :192]
    else:
        wide = values.double() * scales.double()[:, None]
    found = dequantise(weight, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, wide.float().to(dtype))


@pytest.mark.parametrize(("weight_format", "most"), [("int8", 0.01), ("fp8", 0.04), ("int4", 0.12)])
def test_the_relative_error_is_that_of_the_format(weight_format: WeightFormat, most: float) -> None:
    matrix = random(64, 512)
    relative = (squared_error(matrix, weight_format) / matrix.square().sum().item()) ** 0.5
    assert most / 3 < relative < most


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_row_of_zeros_stays_zero_beside_others(weight_format: WeightFormat) -> None:
    matrix = random(3, 256)
    matrix[1] = 0
    found = dequantise(quantise(matrix, weight_format, "w"), torch.float32)
    assert found[1].tolist() == [0.0] * 256
    assert found[0].abs().max() > 1


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-36, 1e-30, 1e30, 3e38])
def test_tiny_and_huge_rows_stay_finite(weight_format: WeightFormat, size: float) -> None:
    matrix = torch.full((2, 128), size)
    matrix[:, ::2] *= -1
    found = dequantise(quantise(matrix, weight_format, "w"), torch.float32)
    assert found.isfinite().all()
    torch.testing.assert_close(found, matrix, rtol=0.07, atol=1e-34)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused_with_name_and_row(
    weight_format: WeightFormat, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise_module, "SLAB_NUMBERS", 64 * 128)
    matrix = random(200, 128)
    matrix[150, 3] = bad
    with pytest.raises(CheckpointError, match=r"layers.0.w: row 150 holds a NaN or an infinity"):
        quantise(matrix, weight_format, "layers.0.w")


@pytest.mark.parametrize("weight_format", FORMATS)
def test_slabs_change_no_bit(weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random(300, 192)
    whole = quantise(matrix, weight_format, "w")
    dequantised = dequantise(whole, torch.bfloat16)
    monkeypatch.setattr(quantise_module, "SLAB_NUMBERS", 64 * 192)
    assert len(list(slabs(300, 192))) == 5
    assert all(map(same_bits, parts(quantise(matrix, weight_format, "w")), parts(whole)))
    assert torch.equal(dequantise(whole, torch.bfloat16), dequantised)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_threads_change_no_bit(weight_format: WeightFormat) -> None:
    matrix, threads = random(128, 512), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(parts(quantise(matrix, weight_format, "w")))
    finally:
        torch.set_num_threads(threads)
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_transposed_matrix_is_stored_row_by_row(weight_format: WeightFormat) -> None:
    matrix = random(128, 6).T
    values, scales = parts(quantise(matrix, weight_format, "w"))
    assert values.is_contiguous()
    expected = parts(quantise(matrix.contiguous(), weight_format, "w"))
    assert same_bits(values, expected[0])
    assert same_bits(scales, expected[1])


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_matrix_is_not_changed(weight_format: WeightFormat) -> None:
    matrix = random(5, 256)
    before = matrix.clone()
    quantise(matrix, weight_format, "w")
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("weight_format", [*FORMATS, "plain"])
def test_stacking_quantised_matrices_is_quantising_the_stack(weight_format: WeightFormat) -> None:
    matrices = [random(n, 192, seed=n) for n in (3, 1, 5)]
    found = stacked([quantise(matrix, weight_format, "w") for matrix in matrices])
    whole = quantise(torch.cat(matrices), weight_format, "w")
    assert type(found) is type(whole)
    assert torch.equal(dequantise(found, torch.float32), dequantise(whole, torch.float32))


@pytest.mark.parametrize("weight_format", FORMATS)
def test_some_rows_of_a_weight_share_its_memory(weight_format: WeightFormat) -> None:
    weight = quantise(random(9, 192), weight_format, "w")
    assert not isinstance(weight, torch.Tensor)
    some = rows_of(weight, slice(2, 5))
    assert shape_of(some) == (3, 192)
    assert torch.equal(dequantise(some, torch.float32), dequantise(weight, torch.float32)[2:5])
    assert some.values.untyped_storage().data_ptr() == weight.values.untyped_storage().data_ptr()


@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 10), (1000, 2048), (129, 1 << 20), (5, 0)])
def test_slabs_cover_all_rows_once(n: int, k: int) -> None:
    ranges = list(slabs(n, k))
    assert [row for rows in ranges for row in range(rows.start, rows.stop)] == list(range(n))
    assert all((rows.stop - rows.start) % 64 == 0 for rows in ranges[:-1])


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("k", [128, 200, 576])
def test_the_bytes_are_those_that_the_planner_counts(weight_format: WeightFormat, k: int) -> None:
    name = "layers.0.attention.wq.weight"
    weight = quantise(random(6, k), weight_format, name)
    found = sum(part.numel() * part.itemsize for part in parts(weight))
    assert found == stored_bytes(name, (6, k), weight_format)
