"""Quantised products on a CPU against the dequantised reference, whatever torch can do here."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixfleet_engine import quantise as quantise_module
from mixfleet_engine.ops.cpu import CpuOps
from mixfleet_engine.ops.cpu_quantised import (
    PACKERS,
    checked_quantised_packer,
    dequantise_slabs,
    pack_int4,
)
from mixfleet_engine.ops.door import Linear
from mixfleet_engine.quantise import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    Quantised,
    dequantise,
    quantise,
)
from mixfleet_engine.weight_formats import WeightFormat

FORMATS: list[WeightFormat] = ["int8", "int4", "fp8"]
FORMS: list[type[Quantised]] = [Int8Weight, Int4Weight, Fp8Weight]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(48, 128), (80, 576), (64, 96), (70, 64), (33, 50), (256, 384)]
"""(N, K): whole and short groups, and widths that torch's operations do not take."""
ROWS = [1, 2, 3, 8, 33]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(n: int, k: int, weight_format: WeightFormat) -> Quantised:
    weight = quantise(random(n, k), weight_format, "w")
    assert not isinstance(weight, torch.Tensor)
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_matches_the_dequantised_product(
    n: int, k: int, weight_format: WeightFormat, dtype: torch.dtype
) -> None:
    weight = make(n, k, weight_format)
    linear = CpuOps(dtype).linear(weight)
    for num_rows in ROWS:
        x = random(num_rows, k, seed=num_rows).to(dtype)
        expected = x.double() @ dequantise(weight, torch.float32).double().T
        found = linear(x)
        assert found.dtype == dtype
        assert found.shape == (num_rows, n)
        off = (found.double() - expected).abs().max() / expected.abs().max()
        assert off < {torch.float32: 3e-6, torch.bfloat16: 0.01}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int4_with_zero_points_matches_the_dequantised_product(
    n: int, k: int, dtype: torch.dtype
) -> None:
    symmetric = make(n, k, "int4")
    assert isinstance(symmetric, Int4Weight)
    zeros = torch.randint(
        0, 16, symmetric.scales.shape, generator=torch.Generator().manual_seed(2)
    ).float()
    weight = replace(symmetric, zeros=zeros)
    x = random(3, k, seed=1).to(dtype)
    expected = x.double() @ dequantise(weight, torch.float32).double().T
    off = (CpuOps(dtype).linear(weight)(x).double() - expected).abs().max() / expected.abs().max()
    assert off < {torch.float32: 3e-6, torch.bfloat16: 0.015}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
@pytest.mark.parametrize(("n", "k"), [(80, 576), (64, 1536), (256, 384)])
def test_a_row_does_not_depend_on_the_rows_beside_it(
    n: int, k: int, weight_format: WeightFormat, dtype: torch.dtype
) -> None:
    linear = CpuOps(dtype).linear(make(n, k, weight_format))
    x = random(70, k, seed=1).to(dtype)
    alone = torch.cat([linear(x[row : row + 1]) for row in range(len(x))])
    for num_rows in (2, 4, 7, 16, 33, 70):
        assert torch.equal(linear(x[:num_rows]), alone[:num_rows]), num_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_a_shape_that_an_operation_does_not_take_is_dequantised(
    weight_format: WeightFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's int8 operation reads beyond the end of such a matrix instead of refusing it.
    used = []

    def noted(weight: Quantised, dtype: torch.dtype) -> Linear:
        used.append(weight)
        return dequantise_slabs(weight, dtype)

    monkeypatch.setattr("mixfleet_engine.ops.cpu_quantised.dequantise_slabs", noted)
    narrow, whole = make(48, 56, weight_format), make(48, 64, weight_format)
    for weight in (narrow, whole):
        PACKERS[type(weight)](weight, dtype)
    assert used == [narrow]


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_product_takes_rows_of_a_wider_tensor(weight_format: WeightFormat) -> None:
    linear = CpuOps(torch.float32).linear(make(48, 128, weight_format))
    wide = random(6, 256, seed=1)
    assert torch.equal(linear(wide[1:4, :128]), linear(wide[1:4, :128].contiguous()))


def test_int4_is_laid_out_the_same_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = make(208, 128, "int4"), random(5, 128, seed=1)
    whole = pack_int4(weight, torch.float32)(x)
    monkeypatch.setattr(quantise_module, "SLAB_NUMBERS", 1)
    assert torch.equal(pack_int4(weight, torch.float32)(x), whole)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_slabs_of_a_dequantised_product_are_put_together_in_order(
    weight_format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = make(200, 128, weight_format), random(3, 128, seed=1)
    whole = x @ dequantise(weight, torch.float32).T
    monkeypatch.setattr(quantise_module, "SLAB_NUMBERS", 1)
    torch.testing.assert_close(dequantise_slabs(weight, torch.float32)(x), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_what_torch_does_here_is_kept_in_silence(
    form: type[Quantised], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    assert checked_quantised_packer(form, dtype) is PACKERS[form]
    assert caplog.records == []


def failing(error: Exception) -> Any:
    def pack(*_: Any) -> Linear:
        raise error

    return pack


@pytest.mark.parametrize(
    "error", [AttributeError("no such operation"), RuntimeError("this CPU cannot"), TypeError("?")]
)
def test_an_operation_that_fails_is_replaced_with_one_warning(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    packer = checked_quantised_packer(Int8Weight, torch.float32, failing(error))
    assert packer is dequantise_slabs
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"int8 weights are dequantised at each step: {error}" in caplog.text


@pytest.mark.parametrize("factor", [1.03, float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operation_that_computes_something_else_is_replaced_with_one_warning(
    dtype: torch.dtype, factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(weight: Quantised, dtype: torch.dtype) -> Linear:
        right = dequantise_slabs(weight, dtype)
        return lambda x: right(x) * factor

    assert checked_quantised_packer(Int4Weight, dtype, wrong) is dequantise_slabs
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "off by" in caplog.text


def test_a_form_is_checked_once_and_only_if_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[type[Quantised]] = []

    def check(form: type[Quantised], _: torch.dtype) -> Any:
        checked.append(form)
        return dequantise_slabs

    monkeypatch.setattr("mixfleet_engine.ops.cpu.checked_quantised_packer", check)
    ops = CpuOps(torch.float32)
    ops.linear(random(4, 8))
    assert checked == []
    for _ in range(2):
        ops.linear(make(4, 8, "int8"))
        ops.linear(make(4, 8, "fp8"))
    assert checked == [Int8Weight, Fp8Weight]
