"""The heap is trimmed each time that enough was freed, and at no other time."""

import pytest

from mixfleet_engine.heap import HeapTrimmer


class Trims(list[int]):
    """Stands in for ``malloc_trim``."""

    def __call__(self, pad: int) -> int:
        self.append(pad)
        return 1


def test_it_trims_each_time_that_enough_was_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    heap, trims = HeapTrimmer(trim_bytes=100), Trims()
    monkeypatch.setattr(heap, "_trim", trims)
    counts = []
    for num_bytes in (60, 39, 1, 99, 500, 0, 100):
        heap.freed(num_bytes)
        counts.append(len(trims))
    assert counts == [0, 0, 1, 1, 2, 2, 3]
    assert set(trims) == {0}


def test_where_there_is_no_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    heap = HeapTrimmer(trim_bytes=1)
    heap.freed(10)
    assert heap._trim is None


def test_the_real_one_runs() -> None:
    HeapTrimmer(trim_bytes=1).freed(2)
