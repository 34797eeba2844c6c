from itertools import accumulate

import pytest
import torch

from mixfleet_engine.rank_order import add_parts, summed
from support.kernels import DEVICE, randn

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_parts_are_added_wide_and_in_the_order_of_the_ranks(
    num_ranks: int, dtype: torch.dtype
) -> None:
    scales = torch.tensor([10.0 ** (rank % 3) for rank in range(num_ranks)], device=DEVICE)
    parts = (randn(num_ranks, 6, 40) * scales[:, None, None]).to(dtype)
    expected = list(accumulate(part.float() for part in parts))[-1]
    assert torch.equal(summed(parts), expected)
    x = randn(6, 40, seed=1)
    for given in (parts, list(parts)):
        total = x.clone()
        add_parts(total, given)
        assert torch.equal(total, x + expected)
