"""Several processes that run one model together, over torch.distributed.

**Sums.** Every rank gets the parts of all and adds them up in the order of the ranks (`rank_order`
says why). With N ranks that moves N/2 times the bytes of a ring, which is the same for two; decode
steps are so small that only the number of messages counts, and that is lower. The parts travel in
the dtype of the blocks and are added up in fp32.

**Recording.** On GPUs the exchanges of a step can be recorded in a CUDA graph: their memory comes
from torch's allocator as they run, which gives a graph memory of its own, and no number is looked
at. NCCL wants that all ranks record the same exchanges or none, and replay them together.

**Waiting.** An idle rank waits for the next plan without limit: when rank 0 ends, the connection
closes and the wait fails. All other exchanges happen inside a step, where nobody waits long.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # dist's own, as mypy sees them

from mixfleet_engine.config import Shard
from mixfleet_engine.errors import ConfigError, StartHangError
from mixfleet_engine.rank_order import add_parts, summed
from mixfleet_engine.ranks import RanksLostError
from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_engine.sharding import part_of
from mixfleet_engine.start_watch import START_PATIENCE_S, Stage, StartWatch
from mixfleet_engine.symmetric_memory import (
    BufferNeeds,
    SymmetricBuffers,
    open_buffers,
    torch_blocks,
)
from mixfleet_engine.weight_loader import Progress

FRAME_WORDS: Final = 2048
"""A plan of up to so many words, less one, is one message; a longer one is two."""
_PLAN_LIMIT: Final = timedelta(days=10_000)
_STEP_LIMIT: Final = timedelta(minutes=5)
"""How long a rank waits for the others inside a step: much longer than any step, and than the time
after which a worker's jobs go elsewhere."""


class TensorParallel:
    """Implements :class:`~mixfleet_engine.ranks.Ranks`; a context manager for the group's life.

    Left without an error on rank 0, it tells the other ranks to end.
    """

    def __init__(self, shard: Shard, watch: StartWatch, device: str, store: Store) -> None:
        self._shard = shard
        self._watch = watch
        self._device = device
        self._buffers: SymmetricBuffers | None = None
        self._releases: list[Callable[[], None]] = []
        if device != "cpu":
            torch.cuda.set_device(device)
        with _lost_if_it_fails():
            dist.init_process_group(
                "gloo",
                store=PrefixStore("groups", store),
                rank=shard.rank,
                world_size=shard.world,
                timeout=_PLAN_LIMIT,
            )
            self._plans = dist.group.WORLD
            backend = "gloo" if device == "cpu" else "nccl"
            self._data = dist.new_group(backend=backend, timeout=_STEP_LIMIT)

    @classmethod
    def connect(
        cls, rendezvous: Rendezvous, device: str, *, patience_s: float = START_PATIENCE_S
    ) -> Self:
        """Meet the other ranks.

        Args:
            rendezvous: Where.
            device: The setting, the same on all ranks: auto, cpu or cuda.
            patience_s: How long a rank may make no progress while it starts.

        Raises:
            ConfigError: The setting names a single device.
            StartHangError: A rank does not come.
        """
        shard = rendezvous.shard
        own_device = rank_device(device, rendezvous.local_rank)
        store = _store(rendezvous, patience_s)
        watch = StartWatch(store, shard, patience_s=patience_s, is_hosted=rendezvous.is_hosted)
        try:
            watch.reached(Stage.RENDEZVOUS)
            watch.wait_for(Stage.RENDEZVOUS)
            ranks = cls(shard, watch, own_device, store)
            watch.reached(Stage.OPENING)
        except BaseException:
            watch.close()
            raise
        return ranks

    @property
    def shard(self) -> Shard:
        """Which rank this is."""
        return self._shard

    @property
    def device(self) -> str:
        """The setting ``device`` of this rank: what it computes on."""
        return self._device

    def sum(self, partial: Tensor) -> Tensor:
        """See :meth:`Ranks.sum <mixfleet_engine.ranks.Ranks.sum>`."""
        return summed(self._all_parts(partial))

    def add_sum(self, x: Tensor, partial: Tensor) -> None:
        """See :meth:`Ranks.add_sum <mixfleet_engine.ranks.Ranks.add_sum>`."""
        if self._buffers is not None and self._buffers.takes(partial):
            self._buffers.add_sum(x, partial)
        else:
            add_parts(x, self._all_parts(partial))

    def share_memory(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        """See :meth:`Ranks.share_memory <mixfleet_engine.ranks.Ranks.share_memory>`."""
        needs = BufferNeeds(
            shard=self._shard,
            device=self._device,
            num_rows=num_rows,
            width=width,
            dtype=dtype,
        )
        self._buffers = open_buffers(
            needs, torch_blocks(self._data), lambda can: self._lowest(int(can)) == 1
        )

    def gather_columns(self, part: Tensor, num_columns: int) -> Tensor:
        """See :meth:`Ranks.gather_columns <mixfleet_engine.ranks.Ranks.gather_columns>`."""
        world = self._shard.world
        cuts = [part_of(num_columns, Shard(rank=rank, world=world)) for rank in range(world)]
        widths = [cut.stop - cut.start for cut in cuts]
        # All ranks must send equal shapes.
        missing = max(widths) - part.shape[1]
        part = F.pad(part, (0, missing)) if missing else part.contiguous()
        is_first = self._shard.rank == 0
        parts = part.new_empty(world, *part.shape) if is_first else None
        with _lost_if_it_fails():
            dist.gather(part, None if parts is None else list(parts), dst=0, group=self._data)
        if parts is None:
            return part.new_empty(0, num_columns)
        return torch.cat([p[:, :width] for p, width in zip(parts, widths, strict=True)], dim=1)

    def watched(self, progress: Progress | None) -> Progress | None:
        """See :meth:`Ranks.watched <mixfleet_engine.ranks.Ranks.watched>`."""

        def report(done: int, total: int) -> None:
            self._watch.reached(Stage.LOADING, done)
            if progress is not None:
                progress(done, total)

        return report

    def lowest(self, number: int, *, is_loaded: bool = False) -> int:
        """See :meth:`Ranks.lowest <mixfleet_engine.ranks.Ranks.lowest>`."""
        # The exchange itself waits for ever, and would not say for whom.
        stage = Stage.LOADED if is_loaded else Stage.LOADING
        self._watch.reached(stage)
        self._watch.wait_for(stage)
        return self._lowest(number)

    def wait_for_loaded(self) -> None:
        """See :meth:`Ranks.wait_for_loaded <mixfleet_engine.ranks.Ranks.wait_for_loaded>`."""
        self._watch.reached(Stage.READY)
        self._watch.wait_for(Stage.READY)
        self._watch.close()

    def on_end(self, release: Callable[[], None]) -> None:
        """See :meth:`Ranks.on_end <mixfleet_engine.ranks.Ranks.on_end>`."""
        self._releases.append(release)

    def send(self, words: Sequence[int]) -> None:
        """See :meth:`Ranks.send <mixfleet_engine.ranks.Ranks.send>`."""
        first, rest = words[: FRAME_WORDS - 1], words[FRAME_WORDS - 1 :]
        frame = torch.zeros(FRAME_WORDS, dtype=torch.long)
        frame[: len(first) + 1] = torch.tensor([len(words), *first])
        with _lost_if_it_fails():
            dist.broadcast(frame, src=0, group=self._plans)
            if rest:
                dist.broadcast(torch.tensor(rest), src=0, group=self._plans)

    def receive(self) -> list[int]:
        """See :meth:`Ranks.receive <mixfleet_engine.ranks.Ranks.receive>`."""
        frame = torch.empty(FRAME_WORDS, dtype=torch.long)
        with _lost_if_it_fails():
            dist.broadcast(frame, src=0, group=self._plans)
            num_words, *words = frame.tolist()
            if num_words < FRAME_WORDS:
                return words[:num_words]
            rest = torch.empty(num_words - len(words), dtype=torch.long)
            dist.broadcast(rest, src=0, group=self._plans)
        return [*words, *rest.tolist()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watch.close()
        try:
            if kind is None and self._shard.rank == 0:
                self.send([])
        finally:
            while self._releases:
                # Out of the list: what it would keep alive keeps this object and its groups alive.
                self._releases.pop()()
            # After an error as well: torch may abort a process that ends with its groups open.
            dist.destroy_process_group()

    def _all_parts(self, partial: Tensor) -> Tensor:
        """Return ``[N, T, D]`` of all N ranks' ``[T, D]``."""
        parts = partial.new_empty(self._shard.world, *partial.shape)
        # The older name warns where there is the newer one.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with _lost_if_it_fails():
            gather(parts.flatten(0, 1), partial.contiguous(), group=self._data)
        return parts

    def _lowest(self, number: int) -> int:
        found = torch.tensor([number])
        with _lost_if_it_fails():
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self._plans)
        return int(found)


def rank_device(name: str, local_rank: int) -> str:
    """Return the setting ``device`` of one rank, of the one that all ranks were given.

    Raises:
        ConfigError: It names a single device, or this machine has too few.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r}: tensor parallelism needs auto, cpu or cuda")
    if name == "cpu":
        return name
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise ConfigError(
            f"device='cuda': rank {local_rank} of this machine needs a device of its own, and the "
            f"machine has {num_devices}"
        )
    return f"cuda:{local_rank}"


def _store(rendezvous: Rendezvous, patience_s: float) -> Store:
    is_host = rendezvous.shard.rank == 0 and not rendezvous.is_hosted
    try:
        store = TCPStore(
            rendezvous.host,
            rendezvous.port,
            is_master=is_host,
            timeout=timedelta(seconds=patience_s),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        where = f"{rendezvous.host}:{rendezvous.port}"
        if is_host:
            raise ConfigError(f"rank 0 cannot listen at {where}: {error}") from error
        host = "torchrun" if rendezvous.is_hosted else "rank 0 hangs in stage 'started', it"
        raise StartHangError(
            f"{host} does not answer at {where}: tried for {patience_s:g} s"
        ) from error
    return PrefixStore(f"mixfleet/{rendezvous.attempt}", store)


@contextmanager
def _lost_if_it_fails() -> Iterator[None]:
    """Turn torch's errors into ours.

    Raises:
        RanksLostError: The block failed.
    """
    try:
        yield
    except RuntimeError as error:
        raise RanksLostError(f"another rank is gone: {str(error).splitlines()[0]}") from error
