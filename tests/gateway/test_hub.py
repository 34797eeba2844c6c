"""The hub's readers against a real Redis: nothing lost and nothing twice, whatever happens."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from mixfleet_broker.channel import FIRST
from mixfleet_broker.connection import connect
from mixfleet_broker.errors import MessageError
from mixfleet_broker.event_codec import TOKENS, encode_chunk
from mixfleet_broker.gateway import hub as hub_module
from mixfleet_broker.gateway.hub import Hub, Subscription
from mixfleet_broker.keys import CHANNEL
from mixfleet_broker.messages import TokenChunk, new_job_id
from support.queue_jobs import chunk
from support.redis_server import ALWAYS, RedisServer
from support.worker_process import until

LIMIT_S = 20.0
OWN_THREADS = ("channels", "bell")


def write(redis: Redis, job_id: str, *numbers: int, run: int = 1) -> None:
    """Append chunks whose token is their number, as a worker does."""
    with redis.pipeline(transaction=False) as pipeline:
        for number in numbers:
            fields: dict[Any, Any] = {"k": TOKENS, "d": encode_chunk(chunk(number, number))}
            pipeline.xadd(CHANNEL(job_id), fields, id=f"{run}-{number}")
        pipeline.execute()


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(OWN_THREADS)]


@asynccontextmanager
async def running_hub(url: str) -> AsyncIterator[Hub]:
    """A hub that is stopped as the gateway does it, and leaves no thread."""
    stop = threading.Event()
    redis = connect(url, patience_s=None, stop=stop)
    hub = Hub(redis)
    try:
        yield hub
    finally:
        stop.set()
        hub.stop()
        redis.close()
        await asyncio.to_thread(until, lambda: not own_threads(), "the threads have ended", 3.0)


async def numbers(subscription: Subscription, job_id: str, last: int) -> list[int]:
    """Return the tokens of a job that come, up to ``last``."""
    found: list[int] = []
    async with asyncio.timeout(LIMIT_S):
        while last not in found:
            for arrived_id, event_id, event in await subscription.next(LIMIT_S):
                assert isinstance(event, TokenChunk)
                assert event_id.endswith(f"-{event.num_tokens}")
                if arrived_id == job_id:
                    found.append(event.num_tokens)
    return found


@pytest.fixture
def few_per_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "CHANNELS_PER_READER", 4)


@pytest.mark.usefixtures("few_per_reader")
def test_many_channels_are_spread_over_readers_and_none_is_lost(
    redis: Redis, redis_url: str
) -> None:
    jobs = [new_job_id() for _ in range(18)]

    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            subscriptions = [hub.follow({job_id: FIRST}) for job_id in jobs]
            assert (hub.num_channels, hub.num_readers) == (18, 5)
            for job_id in jobs:
                await asyncio.to_thread(write, redis, job_id, *range(1, 11))
            for job_id, subscription in zip(jobs, subscriptions, strict=True):
                assert await numbers(subscription, job_id, 10) == list(range(1, 11))
                subscription.close()
            assert hub.num_channels == 0

    asyncio.run(scenario())


@pytest.mark.usefixtures("few_per_reader")
def test_room_of_readers_that_became_free_is_used_again(redis_url: str) -> None:
    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            for _ in range(10):
                with hub.follow(dict.fromkeys((new_job_id() for _ in range(4)), FIRST)):
                    assert hub.num_channels == 4
            assert hub.num_readers == 1

    asyncio.run(scenario())


def test_two_read_one_job_from_different_places(redis: Redis, redis_url: str) -> None:
    job_id = new_job_id()
    write(redis, job_id, *range(1, 6))

    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            with hub.follow({job_id: FIRST}) as whole, hub.follow({job_id: "1-4"}) as rest:
                assert hub.num_readers == 2
                await asyncio.to_thread(write, redis, job_id, 6, 7)
                assert await numbers(whole, job_id, 7) == [1, 2, 3, 4, 5, 6, 7]
                assert await numbers(rest, job_id, 7) == [5, 6, 7]

    asyncio.run(scenario())


def test_one_leaves_and_the_other_reads_on(redis: Redis, redis_url: str) -> None:
    job_id = new_job_id()

    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            first, second = hub.follow({job_id: FIRST}), hub.follow({job_id: FIRST})
            first.close()
            await asyncio.to_thread(write, redis, job_id, 1, 2)
            assert await numbers(second, job_id, 2) == [1, 2]
            assert await first.next(0.01) == []
            second.close()

    asyncio.run(scenario())


def test_a_slow_reader_is_left_alone_and_catches_up(
    redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MAX_WAITING", 64)
    job_id, beside = new_job_id(), new_job_id()
    write(redis, job_id, *range(1, 3001))

    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            with hub.follow({job_id: FIRST}) as slow, hub.follow({beside: FIRST}) as quick:
                async with asyncio.timeout(LIMIT_S):
                    while hub.num_channels > 1:
                        await asyncio.sleep(0.01)
                await asyncio.to_thread(write, redis, beside, 1)
                assert await numbers(quick, beside, 1) == [1]
                first = await slow.next(LIMIT_S)
                # A reply that was under way may be added to the one that filled it.
                assert 64 <= len(first) <= 1024
                await asyncio.to_thread(write, redis, job_id, 3001)
                rest = await numbers(slow, job_id, 3001)
                assert [
                    event.num_tokens for *_, event in first if isinstance(event, TokenChunk)
                ] + (rest) == list(range(1, 3002))

    asyncio.run(scenario())


def test_an_event_that_is_none_hurts_its_own_reader_only(redis: Redis, redis_url: str) -> None:
    bad, good = new_job_id(), new_job_id()
    bad_entries: list[dict[Any, Any]] = [
        {"x": "y"},
        {"k": TOKENS, "d": b"\xc1"},
        {"k": b"\xff", "d": b""},
    ]

    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            with hub.follow({bad: FIRST}) as hurt, hub.follow({good: FIRST}) as whole:
                for fields in bad_entries:
                    await asyncio.to_thread(redis.xadd, CHANNEL(bad), fields)
                await asyncio.to_thread(write, redis, good, 1, 2)
                assert await numbers(whole, good, 2) == [1, 2]
                seen: list[object] = []
                while len(seen) < 3:
                    seen += [event for *_, event in await hurt.next(LIMIT_S)]
                assert all(isinstance(event, MessageError) for event in seen)
                await asyncio.to_thread(write, redis, good, 3)
                assert await numbers(whole, good, 3) == [3]

    asyncio.run(scenario())


def test_an_unknown_job_is_silent_and_a_bad_id_is_refused(redis_url: str) -> None:
    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            with hub.follow({new_job_id(): FIRST}) as unknown:
                assert await unknown.next(0.05) == []
            with pytest.raises(MessageError, match="job_id='a b'"):
                hub.follow({"a b": FIRST})

    asyncio.run(scenario())


def test_a_job_that_is_forgotten_meanwhile_is_silence(redis: Redis, redis_url: str) -> None:
    job_id = new_job_id()
    write(redis, job_id, 1)

    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            with hub.follow({job_id: FIRST}) as subscription:
                assert await numbers(subscription, job_id, 1) == [1]
                await asyncio.to_thread(redis.delete, CHANNEL(job_id))
                assert await subscription.next(0.05) == []

    asyncio.run(scenario())


def test_a_channel_that_is_none_is_told_and_stops_no_other(redis: Redis, redis_url: str) -> None:
    good, broken = new_job_id(), new_job_id()
    redis.set(CHANNEL(broken), "no stream")

    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            with hub.follow({good: FIRST}) as fine, hub.follow({broken: FIRST}) as hurt:
                async with asyncio.timeout(LIMIT_S):
                    [(job_id, _, error)] = await hurt.next(LIMIT_S)
                assert job_id == broken
                assert isinstance(error, MessageError)
                assert "WRONGTYPE" in str(error)
                await asyncio.to_thread(write, redis, good, 1, 2)
                assert await numbers(fine, good, 2) == [1, 2]

    asyncio.run(scenario())


@contextmanager
def written_meanwhile(url: str, job_ids: list[str], last: int) -> Iterator[None]:
    """Write to all jobs in a thread, one token after the other, through whatever happens."""
    stop = threading.Event()

    def work() -> None:
        with connect(url, patience_s=None, stop=stop) as redis:
            for number in range(1, last + 1):
                for job_id in job_ids:
                    fields: dict[Any, Any] = {"k": TOKENS, "d": encode_chunk(chunk(number, number))}
                    # It may have arrived before the connection broke.
                    with suppress(ResponseError):
                        redis.xadd(CHANNEL(job_id), fields, id=f"1-{number}")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join(LIMIT_S)
        stop.set()
        thread.join()


@pytest.mark.slow
def test_streams_go_on_where_they_were_when_redis_comes_back() -> None:
    jobs = [new_job_id() for _ in range(5)]

    async def scenario(server: RedisServer) -> None:
        async with running_hub(server.url) as hub:
            with hub.follow(dict.fromkeys(jobs, FIRST)) as subscription:
                found: dict[str, list[int]] = {job_id: [] for job_id in jobs}
                was_killed = False
                async with asyncio.timeout(60.0):
                    while any(400 not in seen for seen in found.values()):
                        for job_id, _, event in await subscription.next(LIMIT_S):
                            assert isinstance(event, TokenChunk)
                            found[job_id].append(event.num_tokens)
                        if not was_killed and len(found[jobs[0]]) > 50:
                            was_killed = True
                            await asyncio.to_thread(server.kill)
                            await asyncio.to_thread(server.start)
                assert was_killed
                assert all(seen == list(range(1, 401)) for seen in found.values())

    with RedisServer(*ALWAYS) as server, written_meanwhile(server.url, jobs, 400):
        asyncio.run(scenario(server))


def test_stopping_ends_threads_that_wait(redis_url: str) -> None:
    async def scenario() -> None:
        async with running_hub(redis_url) as hub:
            with hub.follow({new_job_id(): FIRST}):
                await asyncio.to_thread(until, lambda: len(own_threads()) >= 2, "they run")
        assert own_threads() == []

    asyncio.run(scenario())
