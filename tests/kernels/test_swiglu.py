import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.ops.cuda.alignment import Alignment
from mixfleet_engine.ops.cuda.swiglu import silu_mul
from support.kernels import DEVICE, off, randn


def plainly(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, dim=-1)
    return F.silu(gate) * up


BOUNDS = [(torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 1e-6)]


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (3, 112), (2, 2048), (2, 2500), (17, 128)])
def test_the_gated_half_is_as_in_plain_torch(
    num_rows: int, width: int, dtype: torch.dtype, bound: float
) -> None:
    x = randn(num_rows, 2 * width, dtype=dtype) * 3
    found = silu_mul(x)
    assert found.dtype == dtype
    assert off(found, plainly(x)) < bound


def test_gates_far_from_zero_give_no_infinity() -> None:
    x = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0, 1, 1, 1, 1, 1]], device=DEVICE)
    assert off(silu_mul(x), plainly(x)) < 1e-6


@pytest.mark.parametrize(("num_rows", "width"), [(1, 64), (5, 448), (3, 2500)])
def test_the_gated_half_may_come_in_fp8(num_rows: int, width: int) -> None:
    x = randn(num_rows, 2 * width, dtype=torch.bfloat16)
    values, scales = silu_mul(x, quantise=True)
    assert values.dtype == torch.float8_e4m3fn
    expected = plainly(x)
    torch.testing.assert_close(scales, expected.abs().amax(dim=1) / 448, rtol=1e-5, atol=0)
    # e4m3 has 3 bits behind the point: half a step is a sixteenth, of the smallest ones 2^-10.
    error = (values.float() * scales[:, None] - expected).abs()
    assert (error <= expected.abs() / 15.9 + scales[:, None] * 2**-9).all()


def aligned(slots: list[int], num_pairs: int) -> Alignment:
    return Alignment(
        sorted_slots=torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        tile_experts=torch.zeros(len(slots) // 2, dtype=torch.int32, device=DEVICE),
        num_pairs=num_pairs,
        top_k=1,
        block_t=2,
    )


@pytest.mark.parametrize("quantise", [False, True])
def test_rows_that_pad_a_tile_are_passed_over(quantise: bool) -> None:
    x = randn(6, 128, dtype=torch.float32)
    x[[1, 3]] = float("nan")
    alignment, kept = aligned([3, 4, 0, 4, 1, 2], 4), [0, 2, 4, 5]
    if quantise:
        values, scales = silu_mul(x, quantise=True, alignment=alignment)
        wanted = silu_mul(x[kept], quantise=True)
        assert torch.equal(values[kept].float(), wanted.values.float())
        assert torch.equal(scales[kept], wanted.scales)
    else:
        found = silu_mul(x, alignment=alignment)
        assert torch.equal(found[kept], silu_mul(x[kept]))


def test_passed_over_rows_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    alignment, x = aligned([0, 1], 1), randn(2, 128)
    # What was in memory before is seen only where that memory is known.
    room = torch.full((2, 64), 7.0, device=DEVICE)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: room)
    silu_mul(x, alignment=alignment)
    assert (room[1] == 7).all()
    assert off(room[:1], plainly(x[:1])) < 1e-6


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    x = randn(9, 2 * 320, dtype=torch.bfloat16)
    assert torch.equal(silu_mul(x)[4:5], silu_mul(x[4:5]))


def test_no_rows_make_none() -> None:
    assert silu_mul(randn(0, 64)).shape == (0, 32)
    assert silu_mul(randn(0, 64), quantise=True).values.shape == (0, 32)
