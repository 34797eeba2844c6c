import pytest
import torch

from mixfleet_engine.layer_weights import OutputWeights
from mixfleet_engine.ops.native.output import NativeOutput
from mixfleet_engine.ops.reference import ReferenceOps
from support.native_cases import FORMS, Case, Form, make_case, native_library, random

WIDTH, VOCABULARY, EPS = 200, 333, 1e-5


def make_output(case: Case, norm: torch.Tensor, threads: int = 1) -> NativeOutput:
    weights = OutputWeights(norm=norm, norm_eps=EPS, weight=case.weight)
    return NativeOutput(weights, native_library(), threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 70])
def test_logits_match_the_reference(form: Form, num_rows: int) -> None:
    case, norm = make_case(form, VOCABULARY, WIDTH), random(WIDTH, seed=1).bfloat16()
    x = random(num_rows, WIDTH, seed=2) * 5
    found = make_output(case, norm)(x)
    assert found.shape == (num_rows, VOCABULARY)
    expected = case.product(ReferenceOps().rms_norm(x, norm.float(), EPS))
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("form", FORMS)
def test_a_rows_logits_have_the_same_bits_alone_and_among_others(form: Form) -> None:
    case, norm = make_case(form, VOCABULARY, WIDTH), random(WIDTH, seed=1)
    x = random(33, WIDTH, seed=2)
    together = make_output(case, norm, threads=2)(x)
    alone = make_output(case, norm)
    for row in range(33):
        assert torch.equal(alone(x[row : row + 1])[0], together[row])
