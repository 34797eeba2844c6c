import ctypes

import pytest
import torch
from torch import Tensor

from mixfleet_engine.ops.reference import ReferenceOps
from support.native_cases import native_library, random

EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS, out: Tensor | None = None) -> Tensor:
    """Call ``mf_rms_norm`` as a team of one."""
    library, pointer = native_library(), ctypes.c_void_p
    arguments = (pointer, pointer, ctypes.c_float, ctypes.c_int64, ctypes.c_int64, pointer)
    library.declare("mf_rms_norm", None, arguments)
    out = torch.full_like(x, torch.nan) if out is None else out
    library.functions.mf_rms_norm(x.data_ptr(), weight.data_ptr(), eps, *x.shape, out.data_ptr())
    return out


@pytest.mark.parametrize("width", [1, 5, 16, 17, 63, 64, 65, 130, 576, 4096])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_rows_of_any_width_and_size_match_the_reference(width: int, size: float) -> None:
    x, weight = random(7, width) * size, random(width, seed=1)
    expected = ReferenceOps().rms_norm(x.double(), weight.double(), EPS)
    torch.testing.assert_close(rms_norm(x, weight), expected.float(), rtol=1e-6, atol=1e-9)


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 40), torch.ones(40)), torch.zeros(2, 40))


def test_the_rows_beside_a_row_change_no_bit() -> None:
    x, weight = random(33, 576), random(576, seed=1)
    whole = rms_norm(x, weight)
    for rows in (1, 2, 5):
        parts = [rms_norm(part, weight) for part in torch.split(x, rows)]
        assert torch.equal(torch.cat(parts), whole)


def test_the_output_may_be_the_input() -> None:
    x, weight = random(3, 70), random(70, seed=1)
    expected = rms_norm(x, weight)
    assert torch.equal(rms_norm(x, weight, out=x), expected)


def test_nothing_is_written_past_the_last_row() -> None:
    x, weight, out = random(2, 21), random(21, seed=1), torch.full((3, 21), 7.0)
    rms_norm(x, weight, out=out)
    assert (out[2] == 7).all()
