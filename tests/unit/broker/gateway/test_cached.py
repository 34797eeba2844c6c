import asyncio

import pytest

from mixfleet_broker.gateway.cached import Cached


class Source:
    """Counts how often it is read; waits until it may answer, or fails."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.error: Exception | None = None
        self.now = 100.0

    async def read(self) -> int:
        self.num_reads += 1
        number = self.num_reads
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return number

    def clock(self) -> float:
        return self.now


def test_a_value_serves_while_it_is_fresh_and_not_longer() -> None:
    async def scenario() -> None:
        source = Source()
        cached = Cached(source.read, 1.0, source.clock)
        assert [await cached.get() for _ in range(3)] == [1, 1, 1]
        source.now += 0.99
        assert await cached.get() == 1
        source.now += 0.01
        assert await cached.get() == 2

    asyncio.run(scenario())


def test_all_who_come_meanwhile_wait_for_one_reading() -> None:
    async def scenario() -> None:
        source = Source()
        source.may_answer.clear()
        cached = Cached(source.read, 1.0, source.clock)
        waiting = [asyncio.create_task(cached.get()) for _ in range(20)]
        await asyncio.sleep(0)
        source.now += 50.0
        source.may_answer.set()
        assert await asyncio.gather(*waiting) == [1] * 20

    asyncio.run(scenario())


def test_an_error_reaches_all_who_wait_and_is_not_kept() -> None:
    async def scenario() -> None:
        source = Source()
        source.may_answer.clear()
        source.error = ValueError("no")
        cached = Cached(source.read, 1.0, source.clock)
        waiting = [asyncio.create_task(cached.get()) for _ in range(3)]
        await asyncio.sleep(0)
        source.may_answer.set()
        failures = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(failure) for failure in failures] == ["no"] * 3
        source.error = None
        assert await cached.get() == 2

    asyncio.run(scenario())


def test_who_gives_up_does_not_take_the_reading_from_the_others() -> None:
    async def scenario() -> None:
        source = Source()
        source.may_answer.clear()
        cached = Cached(source.read, 1.0, source.clock)
        first, second = (asyncio.create_task(cached.get()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        source.may_answer.set()
        assert await second == 1

    asyncio.run(scenario())
