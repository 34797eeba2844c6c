"""Memory that ranks share, with threads as ranks and a stand-in for what torch gives."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from mixfleet_engine import symmetric_memory
from mixfleet_engine.config import EngineConfig, Shard
from mixfleet_engine.rank_order import summed
from mixfleet_engine.symmetric_memory import (
    NUM_TURNS,
    Blocks,
    BufferNeeds,
    Handle,
    SymmetricBuffers,
    open_buffers,
    refusal,
)

T = TypeVar("T")
ROWS, WIDTH = 4, 24
LIMIT_S = 20.0


class SharedBlocks:
    """All ranks' blocks; their barriers are real, so a sum that reads too early reads wrong."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.blocks = [torch.full((NUM_TURNS, ROWS * WIDTH), torch.nan) for _ in range(world)]
        self.barrier = threading.Barrier(world, timeout=LIMIT_S)
        self.votes = [True] * world

    def handle(self, rank: int) -> "SharedHandle":
        return SharedHandle(self, rank)

    def agreed(self, rank: int, can: bool) -> bool:
        self.votes[rank] = can
        self.barrier.wait()
        found = all(self.votes)
        self.barrier.wait()
        return found


class SharedHandle:
    def __init__(self, shared: SharedBlocks, rank: int) -> None:
        self.shared = shared
        self.rank = rank

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, /) -> Tensor:
        return self.shared.blocks[rank].view(dtype).view(sizes)

    def barrier(self) -> None:
        self.shared.barrier.wait()


def needs(rank: int, world: int, *, device: str = "cpu") -> BufferNeeds:
    return BufferNeeds(
        shard=Shard(rank=rank, world=world),
        device=device,
        num_rows=ROWS,
        width=WIDTH,
        dtype=torch.float32,
    )


def on_ranks(world: int, run: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(world) as pool:
        return [done.result(LIMIT_S) for done in [pool.submit(run, n) for n in range(world)]]


def parts(world: int, step: int, num_rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(num_rows, WIDTH, generator=generator) * 10.0 ** (rank % 3)
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_sums_have_the_bits_of_the_order_of_the_ranks_on_every_rank(world: int) -> None:
    shared = SharedBlocks(world)

    def run(rank: int) -> list[Tensor]:
        buffers, found = SymmetricBuffers(shared.handle(rank), needs(rank, world)), []
        for step in range(40):
            num_rows = step % ROWS + 1
            x = torch.full((num_rows, WIDTH), 0.1)
            buffers.add_sum(x, parts(world, step, num_rows)[rank])
            found.append(x)
        return found

    for found in on_ranks(world, run):
        for step, x in enumerate(found):
            expected = torch.full_like(x, 0.1) + summed(parts(world, step, len(x)))
            assert torch.equal(x, expected)


def test_only_sums_that_have_room_are_taken() -> None:
    buffers = SymmetricBuffers(SharedBlocks(2).handle(0), needs(0, 2))
    assert buffers.takes(torch.zeros(ROWS, WIDTH))
    assert buffers.takes(torch.zeros(1, WIDTH))
    assert not buffers.takes(torch.zeros(ROWS + 1, WIDTH))
    assert not buffers.takes(torch.zeros(1, WIDTH, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("shard", "device", "reason"),
    [
        (Shard(rank=0, world=2), "cpu", "only GPUs"),
        (Shard(rank=0, world=9), "cuda:0", "9 ranks: at most 8"),
        (Shard(rank=5, world=8), "cuda:1", "rank 5 runs on cuda:1: .* several machines"),
    ],
)
def test_where_memory_cannot_be_shared_the_reason_is_told(
    shard: Shard, device: str, reason: str
) -> None:
    assert refusal(Shard(rank=1, world=8), "cuda:1") is None
    found = refusal(shard, device)
    assert found is not None
    with pytest.raises(RuntimeError, match=reason):
        raise RuntimeError(found)


def open_on(shared: SharedBlocks, blocks: Blocks) -> list[SymmetricBuffers | None]:
    return on_ranks(
        shared.world,
        lambda rank: open_buffers(
            needs(rank, shared.world), blocks, lambda can: shared.agreed(rank, can)
        ),
    )


@pytest.fixture
def cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric_memory, "refusal", lambda shard, device: None)  # noqa: ARG005


@pytest.mark.usefixtures("cpu_can")
def test_buffers_are_tried_out_before_they_are_used(caplog: pytest.LogCaptureFixture) -> None:
    shared = SharedBlocks(3)
    with caplog.at_level(logging.INFO):
        found = open_on(shared, lambda needs: lambda: shared.handle(needs.shard.rank))
    assert all(found)
    assert "symmetric_memory: sums of up to 4 rows" in caplog.messages


def fails_to_allocate(shared: SharedBlocks, needs: BufferNeeds) -> Callable[[], Handle]:
    if needs.shard.rank == 1:
        raise AttributeError("no function empty_strided_p2p")
    return lambda: shared.handle(needs.shard.rank)


def fails_to_meet(shared: SharedBlocks, needs: BufferNeeds) -> Callable[[], Handle]:
    def meet() -> Handle:
        if needs.shard.rank == 1:
            raise RuntimeError("CUDA driver error: no peer access\nmore of it")
        return shared.handle(needs.shard.rank)

    return meet


class Forgetful(SharedHandle):
    """Whose barriers do not show what the others wrote."""

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, /) -> Tensor:
        found = super().get_buffer(rank, sizes, dtype)
        return found if rank == self.rank else torch.zeros_like(found)


def sums_up_wrongly(shared: SharedBlocks, needs: BufferNeeds) -> Callable[[], Handle]:
    return lambda: Forgetful(shared, needs.shard.rank)


@pytest.mark.usefixtures("cpu_can")
@pytest.mark.parametrize(
    ("made", "reasons"),
    [
        (fails_to_allocate, {"another rank cannot", "no function empty_strided_p2p"}),
        (fails_to_meet, {"another rank cannot", "CUDA driver error: no peer access"}),
        (sums_up_wrongly, {f"a trial sum gave {n} in place of {n + 1}" for n in (0, 2)}),
    ],
)
def test_where_one_rank_cannot_all_go_on_without(
    made: Callable[[SharedBlocks, BufferNeeds], Callable[[], Handle]],
    reasons: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shared = SharedBlocks(2)
    assert open_on(shared, lambda needs: made(shared, needs)) == [None, None]
    told = {message.partition("instead: ")[2] for message in caplog.messages}
    assert told <= reasons | {"another rank cannot"}
    assert told & (reasons - {"another rank cannot"})
    assert all("NCCL sums up instead" in message for message in caplog.messages)


def test_nobody_shares_memory_who_has_not_asked_for_it() -> None:
    assert EngineConfig().symmetric_memory is False
