import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from mixfleet_engine.read_ahead import ReadAhead

NAMES = ("a", "b", "c", "d")
WAIT_S = 10.0


class Disk:
    """Gives each name in capitals, notes who reads what, and can be told to fail."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.read: list[str] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self, name: str) -> str:
        with self._changed:
            self.read.append(name)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
        if name == self.broken:
            raise OSError(f"{name} is broken")
        return name.upper()

    def wait_for(self, is_so: Callable[[list[str]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: is_so(self.read), WAIT_S), self.read


@contextmanager
def reading(disk: Disk, max_bytes: int) -> Iterator[ReadAhead[str]]:
    ahead = ReadAhead(disk, NAMES, num_bytes=len, max_bytes=max_bytes)
    try:
        yield ahead
    finally:
        ahead.close()


def test_all_is_read_once_in_order_and_by_the_thread() -> None:
    disk = Disk()
    with reading(disk, 1) as ahead:
        assert [ahead.take(name) for name in NAMES] == ["A", "B", "C", "D"]
    assert disk.read == list(NAMES)
    assert disk.threads == {"read-ahead"}


def test_what_comes_next_is_read_before_it_is_taken() -> None:
    disk = Disk()
    with reading(disk, 100):
        disk.wait_for(lambda read: len(read) == 4)


def test_no_more_is_kept_than_the_limit() -> None:
    disk = Disk()
    with reading(disk, 2) as ahead:
        disk.wait_for(lambda read: len(read) == 2)
        assert ahead.take("a") == "A"
        disk.wait_for(lambda read: len(read) == 3)
    # When the thread has ended without a fourth, the limit held at every moment.
    assert disk.read == ["a", "b", "c"]


@pytest.mark.parametrize("max_bytes", [1, 100])
def test_another_order_waits_for_nothing_that_never_comes(max_bytes: int) -> None:
    disk = Disk()
    with reading(disk, max_bytes) as ahead:
        assert [ahead.take(name) for name in "dbac"] == ["D", "B", "A", "C"]
    assert sorted(disk.read) == list(NAMES)


def test_a_name_that_nobody_announced_is_read_when_it_is_taken() -> None:
    with reading(Disk(), 1) as ahead:
        assert ahead.take("z") == "Z"
        assert ahead.take("a") == "A"


def test_an_error_is_the_callers_at_the_name_that_has_it() -> None:
    disk = Disk(broken="c")
    with reading(disk, 100) as ahead:
        assert ahead.take("a") == "A"
        assert ahead.take("b") == "B"
        with pytest.raises(OSError, match="c is broken"):
            ahead.take("c")
        assert ahead.take("d") == "D"


def test_nothing_is_read_ahead_after_the_end() -> None:
    disk = Disk()
    with reading(disk, 1) as ahead:
        disk.wait_for(lambda read: read == ["a"])
    assert disk.read == ["a"]
    assert ahead.take("a") == "A", "what was kept is dropped, and read again"
    assert threading.current_thread().name in disk.threads
