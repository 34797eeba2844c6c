import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.ops.cuda.router import route
from support.kernels import DEVICE, randn

SHAPES = [
    (1, 64, 8, 2),
    (7, 96, 8, 2),
    (5, 48, 6, 3),
    (3, 200, 64, 8),
    (4, 33, 1, 1),
    (2, 16, 5, 5),
]


def plainly(normed: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    scores = F.linear(normed.double(), gate.double())
    # A stable sort: of equal scores the lower number comes first, which topk does not promise.
    best, chosen = scores.sort(dim=-1, descending=True, stable=True)
    return best[:, :top_k].softmax(-1).float(), chosen[:, :top_k].int()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "width", "num_experts", "top_k"), SHAPES)
def test_the_best_experts_are_chosen_with_the_shares_of_plain_torch(
    num_tokens: int, width: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    normed = randn(num_tokens, width, dtype=dtype)
    gate = randn(num_experts, width, seed=1)
    shares, chosen = route(normed, gate, top_k)
    wanted_shares, wanted = plainly(normed, gate, top_k)
    assert chosen.dtype == torch.int32
    assert torch.equal(chosen, wanted)
    torch.testing.assert_close(shares, wanted_shares, rtol=1e-4, atol=1e-6)


def test_a_row_wider_than_a_chunk_is_scored_whole() -> None:
    normed, gate = randn(2, 5000), randn(8, 5000, seed=1)
    shares, chosen = route(normed, gate, 2)
    wanted_shares, wanted = plainly(normed, gate, 2)
    assert torch.equal(chosen, wanted)
    torch.testing.assert_close(shares, wanted_shares, rtol=1e-3, atol=1e-6)


def test_scores_are_not_rounded_to_a_shorter_mantissa() -> None:
    # Two scores that differ in the 20th bit: tf32 and bf16 would hold them for equal.
    gate = torch.tensor([[1.0, 0], [1 + 2**-20, 0]], device=DEVICE)
    _, chosen = route(torch.ones(1, 2, device=DEVICE), gate, 2)
    assert chosen.tolist() == [[1, 0]]


def test_of_equal_scores_the_lower_experts_comes_first() -> None:
    normed = randn(4, 32)
    gate = randn(1, 32, seed=1).expand(8, 32).contiguous()
    shares, chosen = route(normed, gate, 3)
    assert chosen.tolist() == [[0, 1, 2]] * 4
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 3))


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (6, 6), (64, 8)])
def test_rows_that_are_not_numbers_have_distinct_experts(num_experts: int, top_k: int) -> None:
    normed = randn(3, 64)
    normed[1] = float("nan")
    shares, chosen = route(normed, randn(num_experts, 64, seed=1), top_k)
    for row in chosen.tolist():
        assert len(set(row)) == top_k
        assert set(row) <= set(range(num_experts))
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(3, device=DEVICE))


def test_an_expert_whose_score_is_not_a_number_comes_last() -> None:
    gate = randn(4, 64, seed=1)
    gate[2] = float("nan")
    _, chosen = route(randn(5, 64), gate, 4)
    assert (chosen[:, 3] == 2).all()


def test_a_token_does_not_depend_on_the_tokens_beside_it() -> None:
    normed, gate = randn(9, 300, dtype=torch.bfloat16), randn(8, 300, seed=1)
    shares, chosen = route(normed, gate, 2)
    for place in range(9):
        alone = route(normed[place : place + 1], gate, 2)
        assert torch.equal(alone[0], shares[place : place + 1])
        assert torch.equal(alone[1], chosen[place : place + 1])


def test_no_tokens_choose_nothing() -> None:
    shares, chosen = route(randn(0, 64), randn(8, 64), 2)
    assert shares.shape == chosen.shape == (0, 2)
