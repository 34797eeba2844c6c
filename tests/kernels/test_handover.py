"""What experts leave to the next norm is added once, whoever comes or does not come."""

import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.blocks import Handover, Mixture
from support.kernels import off, randn

TOKENS, CHOICES, WIDTH = 3, 2, 40


def mixture(seed: int) -> Mixture:
    outputs = randn(TOKENS * CHOICES, WIDTH, seed=seed, dtype=torch.bfloat16)
    return Mixture(outputs, randn(TOKENS, CHOICES, seed=seed + 1).abs())


def added(x: Tensor, left: Mixture) -> Tensor:
    rows = left.outputs.float().view(TOKENS, CHOICES, WIDTH)
    return x + (rows * left.shares[:, :, None]).sum(1)


def test_the_next_norm_takes_what_was_left_for_its_sum() -> None:
    handover, x, left = Handover(), randn(TOKENS, WIDTH), mixture(1)
    before = x.clone()
    handover.leave(x, left)
    assert handover.take(x) is left
    assert torch.equal(x, before)
    assert handover.take(x) is None


def test_what_nobody_took_is_added_when_the_next_comes() -> None:
    handover, x, first, second = Handover(), randn(TOKENS, WIDTH), mixture(1), mixture(5)
    expected = added(x, first)
    handover.leave(x, first)
    handover.leave(x, second)
    assert off(x, expected) < 1e-6
    expected = added(x, second)
    assert handover.take(randn(TOKENS, WIDTH)) is None, "another running sum"
    assert off(x, expected) < 1e-6
    assert handover.take(x) is None
