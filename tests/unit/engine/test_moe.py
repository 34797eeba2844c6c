from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mixfleet_engine.layer_weights import ExpertWeights, MoeWeights
from mixfleet_engine.moe import MoeLayer
from mixfleet_engine.ops.cpu import CpuOps
from mixfleet_engine.ops.door import Ops
from mixfleet_engine.ops.reference import ReferenceOps
from support.dense_mixtral import norm

WIDTH, EXPERT_WIDTH = 16, 24
NORM_EPS = 1e-5
OPS: list[Callable[[], Ops]] = [ReferenceOps, lambda: CpuOps(torch.float32)]


class Weights:
    """Random weights of one layer."""

    def __init__(self, num_experts: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.norm = torch.rand(WIDTH, generator=generator) + 0.5
        self.gate = torch.randn(num_experts, WIDTH, generator=generator)
        self.w13 = (
            torch.randn(num_experts, 2 * EXPERT_WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        )
        self.w2 = (
            torch.randn(num_experts, WIDTH, EXPERT_WIDTH, generator=generator) / EXPERT_WIDTH**0.5
        )

    def layer(self, ops: Ops, top_k: int = 2) -> MoeLayer:
        weights = MoeWeights(
            norm=self.norm,
            norm_eps=NORM_EPS,
            gate=self.gate,
            experts=tuple(
                ExpertWeights(w13=w13, w2=w2) for w13, w2 in zip(self.w13, self.w2, strict=True)
            ),
            experts_per_token=top_k,
        )
        return MoeLayer.make(weights, ops)

    def expert(self, number: int, row: torch.Tensor) -> torch.Tensor:
        gate_up = self.w13[number] @ row
        gated = F.silu(gate_up[:EXPERT_WIDTH]) * gate_up[EXPERT_WIDTH:]
        return torch.mv(self.w2[number], gated)

    def dense(self, x: torch.Tensor, top_k: int = 2) -> torch.Tensor:
        """Every expert for every token, one row at a time."""
        rows = []
        for row in norm(x, self.norm, NORM_EPS):
            shares = (self.gate @ row).softmax(-1)
            chosen = sorted(range(len(shares)), key=lambda e: -shares[e].item())[:top_k]
            total = sum(shares[e] for e in chosen)
            parts = [shares[e] / total * self.expert(e, row) for e in chosen]
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)


def inputs(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make_ops", OPS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64])
def test_moe_matches_the_dense_reference(
    make_ops: Callable[[], Ops], num_tokens: int, top_k: int
) -> None:
    weights, x = Weights(), inputs(num_tokens)
    found = weights.layer(make_ops(), top_k)(x)
    torch.testing.assert_close(found, weights.dense(x, top_k), rtol=1e-4, atol=1e-4)


def test_shares_are_a_softmax_over_the_chosen_only() -> None:
    weights, x = Weights(), inputs(5)
    shares, chosen = weights.layer(ReferenceOps()).route(x)
    assert shares.dtype == torch.float32
    torch.testing.assert_close(shares.sum(-1), torch.ones(5))
    scores = x @ weights.gate.T
    assert chosen.tolist() == scores.argsort(-1, descending=True)[:, :2].tolist()
    torch.testing.assert_close(shares, scores.gather(1, chosen).softmax(-1))


def test_routing_of_bf16_activations_is_done_in_fp32() -> None:
    layer, x = Weights().layer(ReferenceOps()), inputs(50).bfloat16()
    assert torch.equal(layer.route(x)[0], layer.route(x.float())[0])


class CountingExpert:
    """An expert that remembers how many rows each call had."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        return x * 2


@pytest.mark.parametrize("make_ops", OPS)
def test_experts_run_once_each_and_only_if_chosen(make_ops: Callable[[], Ops]) -> None:
    experts = [CountingExpert() for _ in range(4)]
    chosen = torch.tensor([[2, 0], [2, 3], [0, 2]])
    shares = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])
    x = inputs(3)
    mixed = make_ops().mix_experts(x, shares, chosen, experts)
    assert [expert.calls for expert in experts] == [[2], [], [3], [1]]
    torch.testing.assert_close(mixed, x * 2)


@pytest.mark.parametrize("make_ops", OPS)
def test_shares_belong_to_the_expert_of_their_place(make_ops: Callable[[], Ops]) -> None:
    experts = [lambda x, n=n: torch.full_like(x, 10.0**n) for n in range(4)]
    chosen, shares = torch.tensor([[3, 0], [1, 2]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    mixed = make_ops().mix_experts(inputs(2), shares, chosen, experts)
    torch.testing.assert_close(mixed[:, 0], torch.tensor([250.75, 55.0]))


def test_one_shared_copy_runs_once_per_token_and_gives_the_same_sum() -> None:
    shared = CountingExpert()
    x, chosen = inputs(3), torch.tensor([[0, 1], [2, 3], [1, 3]])
    shares = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])
    mixed = CpuOps(torch.float32).mix_experts(x, shares, chosen, [shared] * 4)
    assert shared.calls == [3]
    torch.testing.assert_close(mixed, ReferenceOps().mix_experts(x, shares, chosen, [shared] * 4))


@pytest.mark.parametrize("make_ops", OPS)
def test_a_tokens_output_does_not_depend_on_its_neighbours(make_ops: Callable[[], Ops]) -> None:
    layer, x = Weights().layer(make_ops()), inputs(20)
    together = layer(x)
    for row in range(20):
        alone = layer(x[row : row + 1])[0]
        torch.testing.assert_close(alone, together[row], rtol=1e-5, atol=1e-5)
