"""Turned queries and cached keys and values against the plain computation."""

import pytest
import torch

from mixfleet_engine.ops.cuda.rope_cache import rope_and_cache
from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.rotary import RotaryTable
from support.kernels import DEVICE, off, randint, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (12, 2, 32), (3, 3, 16)])
def test_every_token_goes_to_its_slot(
    dtype: torch.dtype, kv_dtype: torch.dtype | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    num_tokens = 9
    table = RotaryTable(head_dim=head_dim, context_length=64, theta=1e4, device=DEVICE)
    qkv = randn(num_tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype) * 200
    positions = randint(0, 64, num_tokens, seed=1)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:num_tokens].to(DEVICE)
    slots[3] = -1
    cache = torch.full((2, 10, 4, kv_heads, head_dim), 7.0, device=DEVICE).to(kv_dtype or dtype)
    q = rope_and_cache(qkv, table.cos, table.sin, positions, slots, cache[0], cache[1])

    rows = qkv.view(num_tokens, -1, head_dim)
    turned = ReferenceOps().rotate(rows.float(), *table.at(positions))
    allowed = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert off(q, turned[:, :heads]) < allowed
    expected = torch.full((2, 40, kv_heads, head_dim), 7.0, device=DEVICE)
    for token in range(num_tokens):
        if token != 3:
            expected[0, slots[token]] = turned[token, heads : heads + kv_heads]
            expected[1, slots[token]] = rows[token, heads + kv_heads :].float()
    if kv_dtype is not None:
        expected.clamp_(-448, 448)
        allowed = 0.08  # half of the last of three bits
    assert off(cache.float().view(2, 40, kv_heads, head_dim), expected) < allowed


def test_no_token_is_no_work() -> None:
    table = RotaryTable(head_dim=16, context_length=4, theta=1e4, device=DEVICE)
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    cache = torch.zeros(2, 1, 4, 1, 16, device=DEVICE)
    q = rope_and_cache(
        torch.empty(0, 64, device=DEVICE), table.cos, table.sin, nothing, nothing, *cache
    )
    assert q.shape == (0, 2, 16)
