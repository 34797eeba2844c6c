"""Products of very few tokens against plain torch with the numbers that the weights stand for."""

import pytest
import torch

from kernels.test_gemm import ALLOWED, F32, swiglu, weights
from mixfleet_engine.ops.cuda.gemv import dense, dense_up, experts_down, experts_up
from support.kernels import off, randint, randn

FORMS = ["plain", "fp8", "int8", "int4", "int4 with zeros"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dense_product(form: str, dtype: torch.dtype) -> None:
    for num_rows, n, k in [(1, 48, 128), (3, 38, 640), (4, 16, 1024), (2, 16, 192)]:
        weight = weights(form, 1, n, k, dtype, num_rows)
        x = randn(num_rows, k, seed=num_rows, dtype=dtype)
        expected = x.float() @ weight.dequantised(0).T
        assert off(dense(x, weight, dtype=F32), expected) < 2e-6
        assert off(dense(x, weight, dtype=dtype), expected) < ALLOWED[dtype]
        assert off(dense_up(x, weight, dtype=F32), swiglu(expected)) < 4e-6
        total = randn(num_rows, n, seed=9)
        wanted = total + expected
        assert off(dense(x, weight, add_to=total), wanted) < 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_every_pair_of_token_and_expert_gets_its_experts_product(form: str) -> None:
    dtype, experts, width, hidden = torch.bfloat16, 3, 128, 48
    up = weights(form, experts, 2 * hidden, width, dtype, 0)
    down = weights(form, experts, width, hidden, dtype, 9)
    for num_rows in (1, 3):
        chosen = randint(0, experts, num_rows, 2, seed=num_rows).int()
        x = randn(num_rows, width, seed=1, dtype=dtype)
        h = randn(2 * num_rows, hidden, seed=2, dtype=dtype)
        pairs = [(token, int(chosen[token, k])) for token in range(num_rows) for k in range(2)]
        expected = [swiglu(x[t].float() @ up.dequantised(e).T) for t, e in pairs]
        assert off(experts_up(x, up, chosen, dtype=F32), torch.stack(expected)) < 4e-6
        expected = [h[p].float() @ down.dequantised(e).T for p, (_, e) in enumerate(pairs)]
        assert off(experts_down(h, down, chosen, dtype=F32), torch.stack(expected)) < 2e-6


def test_a_token_has_the_same_bits_alone_and_among_others() -> None:
    weight = weights("int4", 1, 32, 640, torch.bfloat16, 0)
    x = randn(4, 640, seed=1, dtype=torch.bfloat16)
    together = dense(x, weight, dtype=F32)
    for row in range(4):
        assert torch.equal(dense(x[row : row + 1], weight, dtype=F32)[0], together[row])
