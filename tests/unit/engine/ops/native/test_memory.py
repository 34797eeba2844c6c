import mmap

import pytest
import torch

from mixfleet_engine.ops.native.memory import (
    ALIGNMENT,
    HUGE_PAGE,
    Scratch,
    aligned_buffer,
    huge_buffer,
)


@pytest.mark.parametrize("num_bytes", [0, 1, 100, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5])
def test_buffers_have_the_length_asked_for_and_begin_at_a_line(num_bytes: int) -> None:
    for buffer in (aligned_buffer(num_bytes), huge_buffer(num_bytes)):
        assert buffer.shape == (num_bytes,)
        assert buffer.dtype == torch.uint8
        assert buffer.data_ptr() % ALIGNMENT == 0 or num_bytes == 0


def test_large_buffers_begin_at_a_huge_page_and_are_zero() -> None:
    buffer = huge_buffer(2 * HUGE_PAGE)
    assert buffer.data_ptr() % HUGE_PAGE == 0
    assert not buffer.any()
    buffer.fill_(1)  # all of it may be written
    assert buffer.all()


def test_scratch_grows_and_never_shrinks() -> None:
    scratch = Scratch()
    first = scratch.pointer(1000)
    assert scratch.pointer(10) == first
    assert scratch.pointer(100_000) % ALIGNMENT == 0
    grown = scratch.pointer(100_000)
    assert scratch.pointer(1000) == grown


def test_a_system_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Refusing(mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            asked.append(option)
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert huge_buffer(HUGE_PAGE).shape == (HUGE_PAGE,)
    assert asked == [mmap.MADV_HUGEPAGE]
