"""Lines of a batch's file: the same in whatever pieces they come, and never all at once."""

import asyncio
import random
import tracemalloc

import pytest

from mixfleet_broker.gateway import batch_requests
from mixfleet_broker.gateway.batch_check import MAX_ERRORS, FileCheck, check_file
from mixfleet_broker.gateway.batch_requests import Line, read_lines


async def lines_of(data: bytes, max_bytes: int) -> list[Line]:
    async def read(begin: int, num_bytes: int) -> bytes:
        return data[begin : begin + num_bytes]

    return [line async for line in read_lines(read, max_bytes)]


def check(data: bytes, max_lines: int = 10**6) -> FileCheck:
    async def read(begin: int, num_bytes: int) -> bytes:
        return data[begin : begin + num_bytes]

    return asyncio.run(check_file(read, max_line_bytes=1000, max_lines=max_lines))


def plain_lines(data: bytes, max_bytes: int) -> list[Line]:
    """All lines of a file, all at once."""
    return [
        Line(place, b"" if len(text) > max_bytes else text, len(text))
        for place, text in enumerate(data.split(b"\n"))
        if text.strip() or len(text) > max_bytes
    ]


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 1000])
def test_lines_are_the_same_in_pieces_of_any_size(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_requests, "PIECE_BYTES", piece_bytes)
    generator = random.Random(piece_bytes)
    for _ in range(200):
        data = bytes(generator.choices(b"ab \n\r", k=generator.randrange(40)))
        for max_bytes in (1, 3, 100):
            found = asyncio.run(lines_of(data, max_bytes))
            assert found == plain_lines(data, max_bytes), data


def test_a_large_file_is_never_held_whole() -> None:
    line = b'{"custom_id": "%d", "body": "' + b"x" * 900 + b'"}\n'
    data = b"".join(line % number for number in range(20_000))
    tracemalloc.start()
    try:
        found = check(data)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.total == 20_000
    assert found.errors == []
    assert peak_bytes < len(data) / 4, peak_bytes


def test_a_line_without_an_end_is_not_held_beyond_the_limit() -> None:
    async def read(begin: int, num_bytes: int) -> bytes:
        return b"x" * num_bytes if begin < 8 << 20 else b""

    async def all_lines() -> list[Line]:
        return [line async for line in read_lines(read, 1000)]

    tracemalloc.start()
    try:
        found = asyncio.run(all_lines())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [Line(0, b"", 8 << 20)]
    assert peak_bytes < 1 << 20, peak_bytes


def test_many_errors_are_counted_and_the_first_are_told() -> None:
    found = check(b'{"custom_id": "a"}\n' * (MAX_ERRORS + 11))
    assert (found.num_errors, len(found.errors)) == (MAX_ERRORS + 10, MAX_ERRORS)
    assert "and 10 more errors" in found.fields()["errors"]


def test_too_many_lines_are_an_error_with_the_numbers() -> None:
    [error] = check(b"{}\n" * 4, max_lines=3).errors
    assert error["message"] == "the file has 4 lines, the limit is 3"
