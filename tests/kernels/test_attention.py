"""Attention over the paged cache against the plain computation, one sequence after the other."""

from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfleet_engine.errors import ConfigError
from mixfleet_engine.ops.cuda import paged_attention
from mixfleet_engine.ops.cuda.attention import attend, check_head_dim
from mixfleet_engine.ops.cuda.attention_tile import row_sums
from mixfleet_engine.ops.cuda.chunks import DeviceChunks
from support.kernels import DEVICE, off, randn

Span = tuple[int, int]
"""Where a chunk starts in its sequence, and its rows."""
FP8 = torch.float8_e4m3fn
ALLOWED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


class Step:
    """Sequences of random numbers, their blocks all over the cache, and NaN wherever nobody is."""

    def __init__(
        self,
        spans: list[Span],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
        padding: int = 0,
    ) -> None:
        lengths = [start + count for start, count in spans]
        widths = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(widths) + 3, generator=torch.Generator().manual_seed(1))
        shape = (len(order), block_size, kv_heads, head_dim)
        self.keys = torch.full(shape, float("nan"), device=DEVICE).to(kv_dtype or dtype)
        self.values = self.keys.clone()
        self.contexts: list[tuple[Tensor, Tensor]] = []
        tables = torch.full((len(spans) + padding, max(widths)), 10**6, dtype=torch.int32)
        used = 0
        for number, (length, width) in enumerate(zip(lengths, widths, strict=True)):
            blocks = order[used : used + width]
            used += width
            tables[number, :width] = blocks
            context = []
            for kind, cache in enumerate((self.keys, self.values)):
                made = randn(length, kv_heads, head_dim, seed=2 * number + kind).to(cache.dtype)
                for place in range(length):
                    block = blocks[place // block_size]
                    _bits(cache)[block, place % block_size] = _bits(made[place])
                context.append(made.float())
            self.contexts.append((context[0], context[1]))
        counts = [count for _, count in spans]
        firsts = [sum(counts[:number]) for number in range(len(counts))]
        rows = [
            torch.tensor([*numbers, *[0] * padding], dtype=torch.int32, device=DEVICE)
            for numbers in (firsts, counts, [start for start, _ in spans])
        ]
        decodes = next((n for n, count in enumerate(counts) if count > 1), len(spans) + padding)
        nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
        self.chunks = DeviceChunks(
            first_rows=rows[0],
            num_rows=rows[1],
            starts=rows[2],
            block_tables=tables.to(DEVICE),
            slots=nothing,
            positions=nothing,
            num_decodes=decodes,
            max_rows=max(counts),
            max_context=max(lengths),
        )
        self.spans = spans
        self.q = randn(sum(counts) + padding, heads, head_dim, seed=99, dtype=dtype)

    def attend(self, split: int = 32) -> Tensor:
        return attend(self.q, self.keys, self.values, self.chunks, split=split)

    def expected(self) -> Tensor:
        found, row = [], 0
        for (start, count), (keys, values) in zip(self.spans, self.contexts, strict=True):
            groups = self.q.shape[1] // keys.shape[1]
            for place in range(start, start + count):
                q = self.q[row].float()
                seen_keys = keys[: place + 1].repeat_interleave(groups, dim=1)
                seen_values = values[: place + 1].repeat_interleave(groups, dim=1)
                scores = torch.einsum("ha,sha->hs", q, seen_keys) * q.shape[-1] ** -0.5
                found.append(torch.einsum("hs,sha->ha", scores.softmax(-1), seen_values))
                row += 1
        return torch.stack(found)


LENGTHS = [1, 15, 16, 17, 31, 32, 33, 70, 129]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "heads", "kv_heads"),
    [
        (torch.float32, None, 3, 3),
        (torch.float32, None, 8, 2),
        (torch.float32, None, 6, 1),
        (torch.bfloat16, None, 8, 2),
        (torch.float16, None, 6, 1),
        (torch.bfloat16, FP8, 12, 2),
    ],
)
def test_decodes(
    dtype: torch.dtype, kv_dtype: torch.dtype | None, heads: int, kv_heads: int
) -> None:
    step = Step(
        [(length - 1, 1) for length in LENGTHS],
        heads=heads,
        kv_heads=kv_heads,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    assert off(step.attend(), step.expected()) < ALLOWED[dtype]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "heads", "kv_heads"),
    [
        (torch.float32, None, 2, 2),
        (torch.float32, None, 8, 2),
        (torch.float32, None, 6, 1),
        (torch.bfloat16, None, 12, 2),
        (torch.bfloat16, FP8, 8, 2),
    ],
)
def test_prefills_beside_decodes(
    dtype: torch.dtype, kv_dtype: torch.dtype | None, heads: int, kv_heads: int
) -> None:
    spans = [(40, 1), (0, 1), (0, 50), (33, 2), (60, 37)]
    step = Step(spans, heads=heads, kv_heads=kv_heads, dtype=dtype, kv_dtype=kv_dtype)
    assert off(step.attend(), step.expected()) < ALLOWED[dtype]


@pytest.mark.parametrize("block_size", [16, 64])
def test_the_real_length_of_a_split_and_a_head(block_size: int) -> None:
    step = Step([(510, 1), (511, 1), (512, 1), (1100, 1)], head_dim=128, block_size=block_size)
    assert off(step.attend(split=512), step.expected()) < ALLOWED[torch.float32]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "heads", "block_size"),
    [
        (torch.float32, None, 8, 16),
        (torch.bfloat16, None, 8, 16),
        (torch.bfloat16, FP8, 12, 64),
    ],
)
def test_a_token_has_the_same_bits_whatever_step_computes_it(
    dtype: torch.dtype, kv_dtype: torch.dtype | None, heads: int, block_size: int
) -> None:
    length = 75

    def make(spans: list[Span]) -> Step:
        return Step(spans, dtype=dtype, kv_dtype=kv_dtype, heads=heads, block_size=block_size)

    whole = make([(0, length)])
    expected = whole.attend()
    for cuts in ([0, 1, 2, 40, 64, length], [0, 33, 74, length]):
        for start, end in pairwise(cuts):
            # Beside another sequence, for the grid to be another one.
            step = make([(start, end - start), (90, 2)])
            step.q[: end - start] = whole.q[start:end]
            _same_context(step, whole, end, block_size)
            assert torch.equal(step.attend()[: end - start], expected[start:end])


def _same_context(step: Step, whole: Step, length: int, block_size: int) -> None:
    """Put the first sequence of ``whole`` where the first one of ``step`` is."""
    tables = step.chunks.block_tables[0], whole.chunks.block_tables[0]
    for own, other in ((step.keys, whole.keys), (step.values, whole.values)):
        for place in range(length):
            block, offset = place // block_size, place % block_size
            _bits(own)[tables[0][block], offset] = _bits(other)[tables[1][block], offset]


def _bits(cache: Tensor) -> Tensor:
    """Return fp8 as bytes, which can be indexed everywhere."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def test_decodes_have_the_same_bits_in_tiles_of_either_height(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Step([(20, 1), (33, 1), (70, 1)], heads=12, dtype=torch.bfloat16)
    expected = step.attend()
    monkeypatch.setattr(paged_attention, "_decode_rows", lambda: 16)
    assert torch.equal(step.attend(), expected)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(numbers_ptr, sums_ptr, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns = tl.arange(0, M), tl.arange(0, N)
    numbers = tl.load(numbers_ptr + rows[:, None] * N + columns[None, :])
    tl.store(sums_ptr + rows, row_sums(numbers, M, N))


@pytest.mark.parametrize("width", [2, 16, 64])
def test_a_row_is_summed_up_by_halves(width: int) -> None:
    numbers = randn(16, width)
    sums = torch.empty(16, device=DEVICE)
    _sum_rows[(1,)](numbers, sums, M=16, N=width)
    while width > 1:
        width //= 2
        numbers = numbers[:, :width] + numbers[:, width:]
    assert torch.equal(sums, numbers[:, 0])


def test_padding_chunks_leave_rows_alone_and_nothing_is_read_for_them() -> None:
    step = Step([(20, 1), (33, 1)], padding=2)
    assert off(step.attend()[:2], step.expected()) < ALLOWED[torch.float32]


def test_a_step_in_any_order_is_right() -> None:
    step = Step([(0, 20), (30, 1), (7, 3)])
    assert step.chunks.num_decodes == 0
    assert off(step.attend(), step.expected()) < ALLOWED[torch.float32]


@pytest.mark.parametrize("head_dim", [8, 80, 96])
def test_heads_of_other_sizes_are_refused_by_number(head_dim: int) -> None:
    with pytest.raises(ConfigError, match=f"head_dim={head_dim}"):
        check_head_dim(head_dim)
    check_head_dim(128)
