"""The CPU back-end against the reference, and its one door to torch's private operations."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mixfleet_engine.batch import make_batch
from mixfleet_engine.kv_cache import to_fp8
from mixfleet_engine.ops.cpu import (
    CpuOps,
    checked_packer,
    pack_nothing,
    pack_with_onednn,
)
from mixfleet_engine.ops.door import Linear, Ops
from mixfleet_engine.ops.reference import ReferenceOps
from support.plans import chunk, plan, table

CPU = torch.device("cpu")
BLOCK_SIZE = 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def cache() -> tuple[torch.Tensor, torch.Tensor]:
    return random(40, BLOCK_SIZE, 2, 16, seed=1), random(40, BLOCK_SIZE, 2, 16, seed=2)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [2, 4, 14])
@pytest.mark.parametrize("lengths", [[1], [9], [5, 6, 7, 8], [1, 30, 2, 17]])
def test_decode_attention_matches_the_reference(
    cache: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    num_heads: int,
    lengths: list[int],
) -> None:
    keys, values = (part.to(dtype) for part in cache)
    chunks = [
        chunk([0], start=n - 1, block_table=table(n, BLOCK_SIZE, first=i * 8))
        for i, n in enumerate(lengths)
    ]
    q = random(len(lengths), num_heads, 16).to(dtype)
    for group in make_batch(plan(*chunks), BLOCK_SIZE, CPU).decodes:
        fast = CpuOps(dtype).decode_attention(q[group.rows], keys, values, group)
        assert_close(fast, ReferenceOps().decode_attention(q[group.rows], keys, values, group))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "num_rows"), [(0, 2), (0, 13), (1, 2), (8, 5), (11, 20)])
def test_prefill_attention_matches_the_reference(
    cache: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype, start: int, num_rows: int
) -> None:
    keys, values = (part.to(dtype) for part in cache)
    blocks = table(start + num_rows, BLOCK_SIZE, first=30, stride=-3)
    planned = plan(chunk([0] * num_rows, start=start, block_table=blocks))
    (prefill,) = make_batch(planned, BLOCK_SIZE, CPU).prefills
    q = random(num_rows, 6, 16).to(dtype)
    fast = CpuOps(dtype).prefill_attention(q, keys, values, prefill)
    assert_close(fast, ReferenceOps().prefill_attention(q, keys, values, prefill))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_over_fp8_is_that_over_the_numbers_that_fp8_kept(
    cache: tuple[torch.Tensor, torch.Tensor], backend: str, dtype: torch.dtype
) -> None:
    rounded = [to_fp8(part) for part in cache]
    kept = [part.to(dtype) for part in rounded]
    exact = [part.to(dtype) for part in cache]
    own: Ops = CpuOps(dtype) if backend == "cpu" else ReferenceOps()
    batch = make_batch(
        plan(
            chunk([0] * 9, start=5, block_table=table(14, BLOCK_SIZE)),
            chunk([0], start=16, block_table=table(17, BLOCK_SIZE, first=7)),
        ),
        BLOCK_SIZE,
        CPU,
    )
    q = random(10, 4, 16).to(dtype)
    (prefill,), (group,) = batch.prefills, batch.decodes
    rows = slice(prefill.first_row, prefill.first_row + prefill.num_rows)

    def both(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        chunk_of = own.prefill_attention(q[rows], keys, values, prefill)
        return torch.cat([chunk_of, own.decode_attention(q[group.rows], keys, values, group)])

    found = both(*rounded)
    assert found.dtype == dtype
    assert torch.equal(found, both(*kept))
    off = (found - both(*exact)).float().norm() / both(*exact).float().norm()
    assert 0.005 < off < 0.05  # 3 bits behind the point are off by 0.026 in the mean square


def test_huge_values_in_masked_slots_do_not_leak(
    cache: tuple[torch.Tensor, torch.Tensor],
) -> None:
    keys, values = cache
    keys[3, 1:], values[3, 1:] = 1e30, 1e30  # the sequence ends at the first slot of block 3
    planned = plan(chunk([0], start=8, block_table=[1, 2, 3]))
    (group,) = make_batch(planned, BLOCK_SIZE, CPU).decodes
    q = random(1, 4, 16)
    fast = CpuOps(torch.float32).decode_attention(q, keys, values, group)
    assert_close(fast, ReferenceOps().decode_attention(q, keys, values, group))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_computed_in_fp32_and_rounded_once_to_the_weights_dtype(
    dtype: torch.dtype,
) -> None:
    x = (random(3, 512) * 1000).to(dtype)
    weight = random(512, seed=1).bfloat16()
    wide = x.float()
    scaled = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = (scaled * weight.float()).bfloat16()
    found = CpuOps(torch.bfloat16).rms_norm(x, weight, 1e-5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.001)


def test_silu_mul_gates_the_second_half_with_the_first() -> None:
    x = random(3, 10)
    assert torch.equal(CpuOps(torch.float32).silu_mul(x), F.silu(x[:, :5]) * x[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 9, 100])
def test_linear_matches_the_plain_product(dtype: torch.dtype, num_rows: int) -> None:
    weight, x = random(70, 50).to(dtype), random(num_rows, 50, seed=1).to(dtype)
    # bf16 products round in another order: a unit in the last place of sums around 7.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.07}[dtype]
    found = CpuOps(dtype).linear(weight)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, F.linear(x, weight), rtol=tolerance, atol=tolerance)


def test_the_packed_matrix_is_a_copy() -> None:
    weight, x = random(48, 32), random(3, 32, seed=1)
    linear = pack_with_onednn(weight)
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before)


def test_a_packed_product_takes_rows_of_a_wider_tensor() -> None:
    weight, wide = random(48, 32), random(6, 64, seed=1)
    linear = CpuOps(torch.float32).linear(weight)
    torch.testing.assert_close(linear(wide[1:4, :32]), F.linear(wide[1:4, :32], weight))


def failing_packer(error: Exception) -> Any:
    def pack(_: torch.Tensor) -> Linear:
        raise error

    return pack


@pytest.mark.parametrize(
    "error", [AttributeError("no such operation"), RuntimeError("this CPU cannot"), TypeError("?")]
)
def test_an_operation_that_fails_is_replaced_with_one_warning(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    ops = CpuOps(torch.float32, packer=failing_packer(error))
    weight, x = random(48, 32), random(3, 32, seed=1)
    assert torch.equal(ops.linear(weight)(x), F.linear(x, weight))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(error) in caplog.text


def test_an_operation_that_computes_something_else_is_replaced_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wrong(weight: torch.Tensor) -> Linear:
        return lambda x: F.linear(x, weight) * 1.01

    assert checked_packer(torch.float32, wrong) is pack_nothing
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "off by" in caplog.text


def test_not_a_number_is_not_close_to_anything(caplog: pytest.LogCaptureFixture) -> None:
    def broken(weight: torch.Tensor) -> Linear:
        return lambda x: F.linear(x, weight) * float("nan")

    assert checked_packer(torch.float32, broken) is pack_nothing
    assert len(caplog.records) == 1


def test_a_packer_that_works_is_kept_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    def fine(weight: torch.Tensor) -> Linear:
        return lambda x: x @ weight.T

    assert checked_packer(torch.float32, fine) is fine
    assert caplog.records == []
