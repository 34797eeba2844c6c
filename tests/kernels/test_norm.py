import pytest
import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.combine import combine_into
from mixfleet_engine.ops.cuda.norm import norm_and_route, rms_norm
from mixfleet_engine.ops.cuda.quant import QuantisedRows, quantise_rows
from mixfleet_engine.ops.cuda.router import route
from mixfleet_engine.ops.reference import ReferenceOps
from support.kernels import off, randn

EPS = 1e-5
SHAPES = [(1, 1), (1, 96), (7, 128), (3, 384), (2, 1536)]
BOUNDS = [(torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float32, 1e-6)]


def plainly(x: Tensor, weight: Tensor) -> Tensor:
    return ReferenceOps().rms_norm(x, weight.float(), EPS)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("num_tokens", "width"), SHAPES)
def test_rows_are_normed_as_in_the_reference(
    num_tokens: int, width: int, dtype: torch.dtype, bound: float
) -> None:
    x, weight = randn(num_tokens, width) * 5, randn(width, seed=1, dtype=dtype)
    before = x.clone()
    found = rms_norm(x, weight, EPS, dtype=dtype)
    assert found.dtype == dtype
    assert off(found, plainly(x, weight)) < bound
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "width"), SHAPES)
def test_what_is_added_first_stays_in_the_running_sum(
    num_tokens: int, width: int, dtype: torch.dtype
) -> None:
    x, weight = randn(num_tokens, width), randn(width, seed=1)
    add = randn(num_tokens, width, seed=2, dtype=dtype)
    expected = x + add.float()
    found = rms_norm(x, weight, EPS, dtype=torch.float32, add=add)
    assert torch.equal(x, expected)
    assert off(found, plainly(expected, weight)) < 1e-6


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(("num_tokens", "width"), SHAPES)
def test_experts_outputs_are_added_as_they_would_be_alone(
    num_tokens: int, width: int, top_k: int
) -> None:
    x, weight = randn(num_tokens, width), randn(width, seed=1)
    y = randn(num_tokens * top_k, width, seed=2, dtype=torch.bfloat16)
    shares = randn(num_tokens, top_k, seed=3).softmax(-1)
    expected = x.clone()
    combine_into(expected, y, shares)
    found = rms_norm(x, weight, EPS, dtype=torch.float32, add=y, shares=shares)
    assert off(x, expected) < 1e-6
    assert off(found, plainly(expected, weight)) < 1e-5


@pytest.mark.parametrize(("num_tokens", "width"), SHAPES)
def test_normed_rows_may_come_in_fp8(num_tokens: int, width: int) -> None:
    x, weight = randn(num_tokens, width), randn(width, seed=1)
    expected = quantise_rows(rms_norm(x, weight, EPS, dtype=torch.float32))
    found = rms_norm(x, weight, EPS, dtype=torch.bfloat16, quantise=True)
    torch.testing.assert_close(found.scales, expected.scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.values.float(), expected.values.float(), rtol=0.13, atol=0.01)


def test_a_row_of_zeros_has_scale_zero() -> None:
    x = randn(3, 64)
    x[1] = 0
    values, scales = rms_norm(x, randn(64, seed=1), EPS, dtype=torch.bfloat16, quantise=True)
    assert scales[1] == 0
    assert (values[1].float() == 0).all()


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize(("width", "num_experts", "top_k"), [(96, 8, 2), (3000, 8, 2), (128, 6, 3)])
def test_the_router_in_the_same_pass_chooses_as_the_one_behind_it(
    width: int, num_experts: int, top_k: int, quantise: bool
) -> None:
    x, weight = randn(5, width), randn(width, seed=1, dtype=torch.bfloat16)
    gate = randn(num_experts, width, seed=2)
    before = x.clone()
    normed, shares, chosen = norm_and_route(
        x, weight, EPS, gate, top_k, dtype=torch.bfloat16, quantise=quantise
    )
    alone = rms_norm(x, weight, EPS, dtype=torch.bfloat16)
    wanted_shares, wanted = route(alone, gate, top_k)
    assert torch.equal(x, before)
    assert torch.equal(chosen, wanted)
    torch.testing.assert_close(shares, wanted_shares, rtol=1e-4, atol=1e-6)
    if quantise:
        assert isinstance(normed, QuantisedRows)
        assert off(normed.values.float() * normed.scales[:, None], alone) < 0.04
    else:
        assert isinstance(normed, torch.Tensor)
        assert torch.equal(normed, alone)


def test_a_token_does_not_depend_on_the_tokens_beside_it() -> None:
    x, weight, gate = randn(9, 300), randn(300, seed=1), randn(8, 300, seed=2)
    y, shares = randn(18, 300, seed=3, dtype=torch.bfloat16), randn(9, 2, seed=4).softmax(-1)
    one, one_y, one_shares = x[4:5].clone(), y[8:10].clone(), shares[4:5].clone()
    normed = rms_norm(x, weight, EPS, dtype=torch.bfloat16, add=y, shares=shares)
    alone = rms_norm(one, weight, EPS, dtype=torch.bfloat16, add=one_y, shares=one_shares)
    assert torch.equal(normed[4:5], alone)
    assert torch.equal(x[4:5], one)
    routed = norm_and_route(x, weight, EPS, gate, 2, dtype=torch.bfloat16)
    routed_alone = norm_and_route(one, weight, EPS, gate, 2, dtype=torch.bfloat16)
    for found, expected in zip(routed, routed_alone, strict=True):
        assert isinstance(found, torch.Tensor)
        assert isinstance(expected, torch.Tensor)
        assert torch.equal(found[4:5], expected)


def test_no_tokens_are_normed_to_none() -> None:
    x, weight = randn(0, 64), randn(64)
    assert rms_norm(x, weight, EPS, dtype=torch.bfloat16).shape == (0, 64)
    normed, shares, chosen = norm_and_route(x, weight, EPS, randn(8, 64), 2, dtype=torch.bfloat16)
    assert isinstance(normed, torch.Tensor)
    assert normed.shape == (0, 64)
    assert shares.shape == chosen.shape == (0, 2)
