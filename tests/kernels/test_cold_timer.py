from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
import torch

from mixfleet_engine.ops.cuda.cold_timer import REPEATS, WARM_UPS, ColdTimer


@dataclass
class Stream:
    """A stream whose launches take the times that it is given, in milliseconds."""

    times: Iterator[float]
    clock: float = 0.0

    def launch(self) -> None:
        self.clock += next(self.times)

    def event(self, *, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.at = 0.0

    def record(self) -> None:
        self.at = self._stream.clock

    def elapsed_time(self, after: "Event") -> float:
        return after.at - self.at


def test_the_median_of_the_warm_launches_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    few = REPEATS // 2
    stream = Stream(chain(repeat(900.0, WARM_UPS), repeat(70.0, few), [3.0], repeat(2.0, few)))
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    l2 = SimpleNamespace(L2_cache_size=1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: l2)
    assert ColdTimer(torch.device("cpu"))(stream.launch) == pytest.approx(3e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_matrix_that_fits_l2_is_read_from_memory_each_time() -> None:
    device = torch.device("cuda")
    matrix = torch.ones(8 << 20, device=device)  # 32 MiB
    found = torch.empty((), device=device)

    def launch() -> None:
        torch.sum(matrix, dim=(0,), out=found)

    seconds = ColdTimer(device)(launch)
    assert 4 * matrix.numel() / seconds < 5e12  # bytes a second of HBM; of L2 it would be more
