from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixfleet_engine.errors import ConfigError
from mixfleet_engine.ops.native.linear import NativeLinear
from mixfleet_engine.ops.native.matrix import PackedMatrices
from mixfleet_engine.quantise import Fp8Weight, Int4Weight, dequantise, quantise
from mixfleet_engine.weight_formats import WeightFormat
from support.native_cases import FORMS, Case, Form, make_case, native_library, random, rounded

SHAPES = [(1, 2), (31, 64), (33, 130), (70, 128), (96, 576), (45, 1000)]
MANY_ROWS = [1, 2, 5, 12, 13, 33, 48, 49, 300]


def linear(case: Case, threads: int = 1) -> NativeLinear:
    return NativeLinear(case.weight, native_library(), threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_form_matches_the_product_in_double_precision(form: Form, n: int, k: int) -> None:
    case = make_case(form, n, k)
    multiply = linear(case)
    for num_rows in MANY_ROWS:
        x = random(num_rows, k, seed=num_rows)
        found = multiply(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, case.product(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("num_inputs", [3, 131])
@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_a_width_may_be_odd(form: Form, num_inputs: int) -> None:
    case, x = make_case(form, 40, num_inputs), random(7, num_inputs, seed=1)
    torch.testing.assert_close(linear(case)(x), case.product(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_quantised_products_are_near_the_dequantised_one(form: Form) -> None:
    case, x = make_case(form, 96, 512), random(50, 512, seed=1)
    expected = x @ case.plain.T
    off = (linear(case)(x) - expected).norm() / expected.norm()
    assert off < (0.004 if form == "bf16" else 0.012)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("num_inputs", [256, 576])
def test_weights_of_the_engines_own_quantiser_stand_for_their_dequantised_ones(
    form: WeightFormat, num_inputs: int
) -> None:
    weight = quantise(random(90, num_inputs).bfloat16(), form, "a matrix")
    x = random(20, num_inputs, seed=1)
    expected = rounded(x, "int8").float() @ dequantise(weight, torch.float32).T
    found = NativeLinear(weight, native_library(), 1)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_same_bits_alone_and_among_others(form: Form) -> None:
    case = make_case(form, 75, 1152)
    x = random(300, 1152, seed=1)
    multiply = linear(case)
    alone = torch.cat([multiply(row[None]) for row in x])
    for num_rows in MANY_ROWS:
        assert torch.equal(multiply(x[:num_rows]), alone[:num_rows])
        assert torch.equal(multiply(x[-num_rows:]), alone[-num_rows:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [1, 30, 200])
def test_the_number_of_threads_changes_no_bit(form: Form, num_rows: int) -> None:
    case, x = make_case(form, 330, 256), random(num_rows, 256, seed=1)
    one = linear(case)(x)
    for threads in (2, 3):
        assert torch.equal(linear(case, threads)(x), one)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 129])
def test_a_number_that_is_not_finite_stays_in_its_row(form: Form, bad: float, place: int) -> None:
    case, x = make_case(form, 40, 256), random(20, 256, seed=1)
    multiply = linear(case)
    expected = multiply(x)
    x[7, place] = bad
    found = multiply(x)
    assert not found[7].isfinite().any()
    others = torch.arange(20) != 7
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_zeros_or_of_next_to_nothing_gives_zeros(form: Form) -> None:
    x = torch.zeros(3, 256)
    x[1] = 1e-41
    assert torch.equal(linear(make_case(form, 40, 256))(x), torch.zeros(3, 40))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_largest_sums_of_8_bits_do_not_overflow(form: Form) -> None:
    case = make_case(form, 32, 16384)
    x = case.plain.sign()  # every term of output i in row i is positive
    found = linear(case)(x)
    torch.testing.assert_close(found, case.product(x), rtol=1e-5, atol=1e-4)


def test_input_may_be_bf16_and_a_part_of_a_wider_tensor() -> None:
    case, wide = make_case("bf16", 40, 64), random(9, 100, seed=1).bfloat16()
    multiply, part = linear(case), wide[2:7, 10:74]
    assert torch.equal(multiply(part), multiply(part.float().contiguous()))


def test_no_rows_give_no_rows() -> None:
    assert linear(make_case("bf16", 40, 64))(torch.empty(0, 64)).shape == (0, 40)


@pytest.mark.parametrize("form", FORMS)
def test_the_packed_matrix_is_a_copy(form: Form) -> None:
    case, x = make_case(form, 40, 256), random(3, 256, seed=1)
    multiply = linear(case)
    before = multiply(x)
    weight: Any = case.weight
    for tensor in (weight,) if form == "bf16" else (weight.values, weight.scales):
        tensor.zero_()
    assert torch.equal(multiply(x), before)


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        (torch.zeros(4, 4), "torch.float32"),
        (torch.zeros(4, 4, dtype=torch.float16), "torch.float16"),
        (Fp8Weight(values=torch.zeros(4, 4), scales=torch.ones(4)), "Fp8Weight"),
        (
            Int4Weight(values=torch.zeros(4, 2), scales=torch.ones(4, 1), zeros=torch.ones(4, 1)),
            "zero points: the native back-end takes symmetric ones; weight_dtype=int8",
        ),
    ],
)
def test_another_dtype_is_refused_by_name(weight: Any, name: str) -> None:
    nobody: Any = SimpleNamespace(functions=None)
    with pytest.raises(ConfigError, match=name):
        PackedMatrices(nobody, [weight])


def test_matrices_of_one_block_have_one_shape_and_form() -> None:
    nobody: Any = SimpleNamespace(functions=None)
    weights = [make_case("bf16", 4, 128).weight, make_case("int8", 4, 128).weight]
    with pytest.raises(ConfigError, match=r"\(0, 4, 128\), \(1, 4, 128\)"):
        PackedMatrices(nobody, weights)
