import math

import pytest
import torch

from mixfleet_engine.checkpoint_mistral import rotary_halves_apart
from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.rotary import RotaryTable
from support.dense_mixtral import rotate as slow_rotate

HEAD_DIM, THETA = 16, 1e6


def make_table(context_length: int = 64) -> RotaryTable:
    return RotaryTable(
        head_dim=HEAD_DIM,
        context_length=context_length,
        theta=THETA,
        device=torch.device("cpu"),
    )


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return ReferenceOps().rotate(x, *make_table().at(positions))


def test_rotation_matches_the_slow_one() -> None:
    x = torch.randn(9, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    expected = slow_rotate(x.double(), THETA).float()
    torch.testing.assert_close(rotate(x, torch.arange(9)), expected)


def test_position_0_is_not_turned() -> None:
    x = torch.randn(1, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x, torch.tensor([0])), x)


def test_positions_may_come_in_any_order() -> None:
    x = torch.randn(3, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([7, 0, 31])
    turned = rotate(x, positions)
    for row, position in enumerate(positions.tolist()):
        alone = rotate(x[row : row + 1], torch.tensor([position]))
        assert torch.equal(turned[row : row + 1], alone)


@pytest.mark.parametrize("shift", [1, 17, 40])
def test_products_depend_on_the_distance_only(shift: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, HEAD_DIM, generator=generator)

    def product(q_at: int, k_at: int) -> torch.Tensor:
        return (rotate(q, torch.tensor([q_at])) * rotate(k, torch.tensor([k_at]))).sum()

    torch.testing.assert_close(product(5 + shift, 2 + shift), product(5, 2))


def test_mistrals_adjacent_pairs_give_the_same_products_after_the_rows_moved() -> None:
    """Both layouts must mean the same model: rotate as Mistral writes it, with complex numbers."""
    generator = torch.Generator().manual_seed(0)
    wq, wk = torch.randn(2, HEAD_DIM, 24, generator=generator)
    x = torch.randn(5, 24, generator=generator)
    frequencies = THETA ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.outer(torch.arange(5.0), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)

    def adjacent(weight: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ weight.T).view(5, HEAD_DIM // 2, 2))
        return torch.view_as_real(pairs * turns).flatten(1)

    def apart(weight: torch.Tensor) -> torch.Tensor:
        moved = (x @ rotary_halves_apart(weight, HEAD_DIM).T)[:, None]
        return rotate(moved, torch.arange(5))[:, 0]

    torch.testing.assert_close(apart(wq) @ apart(wk).T, adjacent(wq) @ adjacent(wk).T)


def test_tables_are_fp32_and_exact_at_late_positions() -> None:
    cos, sin = make_table(context_length=32768).at(torch.tensor([32767]))
    assert cos.dtype == sin.dtype == torch.float32
    for i in range(HEAD_DIM // 2):
        angle = 32767 / THETA ** (2 * i / HEAD_DIM)
        # fp32 angles near 32767 are 0.002 apart
        assert cos[0, i].item() == pytest.approx(math.cos(angle), abs=0.005)


def test_bf16_input_is_turned_in_fp32_and_rounded_once() -> None:
    x = torch.randn(4, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, torch.arange(4))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), torch.arange(4)).bfloat16())
