import pytest
import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.combine import combine, combine_into
from support.kernels import off, randn


def shares_of(num_tokens: int, top_k: int) -> Tensor:
    return randn(num_tokens, top_k, seed=1).softmax(-1)


def plainly(y: Tensor, shares: Tensor) -> Tensor:
    return (y.float().view(*shares.shape, -1) * shares[:, :, None]).sum(dim=1)


SHAPES = [(1, 1, 1), (1, 2, 64), (5, 2, 1024), (3, 3, 1500), (17, 8, 96)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "top_k", "width"), SHAPES)
def test_the_sum_of_a_tokens_experts_is_that_of_plain_torch(
    num_tokens: int, top_k: int, width: int, dtype: torch.dtype
) -> None:
    y, shares = randn(num_tokens * top_k, width, dtype=dtype), shares_of(num_tokens, top_k)
    found = combine(y, shares)
    assert found.dtype == dtype
    assert off(found, plainly(y, shares)) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(("num_tokens", "top_k", "width"), SHAPES)
def test_the_sum_goes_unrounded_into_the_running_sum(
    num_tokens: int, top_k: int, width: int
) -> None:
    y = randn(num_tokens * top_k, width, dtype=torch.bfloat16)
    shares, x = shares_of(num_tokens, top_k), randn(num_tokens, width, seed=2)
    expected = x + plainly(y, shares)
    combine_into(x, y, shares)
    assert off(x, expected) < 1e-6


def test_a_token_does_not_depend_on_the_tokens_beside_it() -> None:
    y, shares = randn(18, 1100, dtype=torch.bfloat16), shares_of(9, 2)
    assert torch.equal(combine(y, shares)[4:5], combine(y[8:10], shares[4:5]))


def test_no_tokens_have_no_sum() -> None:
    assert combine(randn(0, 64), shares_of(0, 2)).shape == (0, 64)
