import pytest
import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.rank_sum import add_gathered, add_spread
from support.kernels import randn

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (1, 512), (3, 171), (7, 384), (2, 1536)]


def parts_of(num_ranks: int, num_tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Parts of very different sizes, so that another order gives other bits."""
    found = randn(num_ranks, num_tokens, width, seed=num_ranks)
    scales = torch.tensor([10.0 ** (rank % 4) for rank in range(num_ranks)])
    return (found * scales.to(found.device)[:, None, None]).to(dtype)


def in_order(x: Tensor, parts: Tensor) -> Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return x + total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("num_tokens", "width"), SHAPES)
def test_the_bits_are_those_of_plain_additions_in_the_order_of_the_ranks(
    num_tokens: int, width: int, num_ranks: int, dtype: torch.dtype
) -> None:
    x, parts = randn(num_tokens, width), parts_of(num_ranks, num_tokens, width, dtype)
    expected = in_order(x, parts)
    gathered, spread = x.clone(), x.clone()
    add_gathered(gathered, parts)
    add_spread(spread, [part.clone() for part in parts])
    assert torch.equal(gathered, expected)
    assert torch.equal(spread, expected)


def test_another_order_would_be_noticed() -> None:
    x, parts = randn(7, 384), parts_of(3, 7, 384, torch.float32)
    assert not torch.equal(in_order(x, parts), in_order(x, parts.flip(0)))


def test_a_token_does_not_depend_on_the_tokens_beside_it() -> None:
    x, parts = randn(9, 300), parts_of(4, 9, 300, torch.bfloat16)
    one = x[4:5].clone()
    add_gathered(one, parts[:, 4:5].contiguous())
    add_gathered(x, parts)
    assert torch.equal(x[4:5], one)


def test_a_number_that_is_none_stays_at_its_own_place() -> None:
    x, parts = randn(2, 600), parts_of(2, 2, 600, torch.bfloat16)
    expected = in_order(x, parts)
    parts[1, 1, 599] = float("nan")
    add_gathered(x, parts)
    assert x[1, 599].isnan()
    assert torch.equal(x.flatten()[:-1], expected.flatten()[:-1])


def test_no_tokens_get_nothing() -> None:
    x = randn(0, 64)
    add_gathered(x, randn(2, 0, 64))
    add_spread(x, [randn(0, 64), randn(0, 64)])
    assert x.shape == (0, 64)
