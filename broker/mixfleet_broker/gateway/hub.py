"""The readers of channels: a few threads that wait for events of many jobs, and hand them over.

Each thread waits on one connection for about a hundred channels at once, so that a gateway with
thousands of streams needs a few dozen connections and no polling. What it reads goes to the event
loop in one call per reply. A reader that does not keep up is left alone until it has caught up:
its events wait in Redis, not here.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Final, Self

from redis import Redis

from mixfleet_broker.channel import Bell, decode_entry, read_channels, read_events, ring
from mixfleet_broker.errors import BrokerError, MessageError
from mixfleet_broker.keys import READER_BELL
from mixfleet_broker.messages import JobEnd, JobEvent
from mixfleet_broker.names import check_job_id

logger = logging.getLogger(__name__)

CHANNELS_PER_READER: Final = 100
"""Of one XREAD: more of them make each call slower, fewer need more connections."""
MAX_WAITING: Final = 1024
"""Events that may lie in a subscription; above it, its channels are not read any more."""
_BLOCK_S: Final = 5.0
_BREATHER_S: Final = 0.2

Arrival = tuple[str, str, JobEvent | MessageError]
"""Job id, event id, and the event, or what is wrong with it."""


class Subscription:
    """What comes on the channels of one or a few jobs. Belongs to the event loop.

    Leave it with :meth:`close`, or use it as a context manager.
    """

    def __init__(self, hub: "Hub", after: Mapping[str, str]) -> None:
        self._hub = hub
        self._after = dict(after)
        """By job id, the last event that was taken; a job that has ended is not in it."""
        self._readers: dict[str, _Reader] = {}
        self._arrived: deque[Arrival] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def next(self, timeout_s: float) -> list[Arrival]:
        """Return all that has come, at least one event; nothing if none came in time."""
        if not self._arrived:
            # By hand: this is the way of every chunk, and asyncio.timeout costs as much as it.
            loop = asyncio.get_running_loop()
            self._waiter = waiter = loop.create_future()
            timer = loop.call_later(timeout_s, _wake, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = None
        arrived = list(self._arrived)
        self._arrived.clear()
        if not self._readers:
            self.read_on()
        return arrived

    def read_on(self) -> None:
        """Let the channels of the jobs that have not ended be read."""
        for job_id, place in self._after.items():
            self._readers[job_id] = self._hub.read(self, job_id, place)

    def close(self) -> None:
        """Hear no more."""
        for job_id, reader in self._readers.items():
            reader.remove(job_id)
        self._readers.clear()
        self._after.clear()

    def deliver(self, job_id: str, entries: Iterable[Any]) -> None:
        """Take what a reader has read; called in the event loop."""
        for entry in entries:
            if job_id not in self._after:
                return
            self._take(job_id, entry)
        if self._waiter is not None and self._arrived:
            _wake(self._waiter)
        if len(self._arrived) >= MAX_WAITING:
            for name, reader in self._readers.items():
                reader.remove(name)
            self._readers.clear()

    def give_up(self, job_id: str, error: MessageError) -> None:
        """Take it that a channel cannot be read at all; called in the event loop."""
        place = self._after.pop(job_id, None)
        self._readers.pop(job_id, None)
        if place is not None:
            self._arrived.append((job_id, place, error))
            if self._waiter is not None:
                _wake(self._waiter)

    def _take(self, job_id: str, entry: Any) -> None:
        event: JobEvent | MessageError
        try:
            event_id, event = decode_entry(entry)
        except MessageError as error:
            event_id, event = entry[0].decode(), error
        if _place(event_id) <= _place(self._after[job_id]):
            return  # a reply that was under way while the reading was interrupted
        self._after[job_id] = event_id
        self._arrived.append((job_id, event_id, event))
        if isinstance(event, JobEnd):
            del self._after[job_id]
            reader = self._readers.pop(job_id, None)
            if reader is not None:
                reader.remove(job_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Hub:
    """All subscriptions of a gateway; made and used in one event loop.

    Args:
        redis: A client that waits for a Redis that is away, until it is told to stop.
        prefix: Before all keys.
    """

    def __init__(self, redis: Redis, *, prefix: str = "") -> None:
        self._redis = redis
        self._prefix = prefix
        self._loop = asyncio.get_running_loop()
        # Bells are rung from here: the event loop itself never waits for Redis.
        self._ringers = ThreadPoolExecutor(2, thread_name_prefix="bell")
        self._readers: list[_Reader] = []

    @property
    def num_channels(self) -> int:
        """Channels that are read now."""
        return sum(reader.num_channels for reader in self._readers)

    @property
    def num_readers(self) -> int:
        """Threads, each with a connection of its own."""
        return len(self._readers)

    def follow(self, after: Mapping[str, str]) -> Subscription:
        """Return what comes on the channels of jobs, which need not exist yet.

        Args:
            after: By job id, the event after which to begin; ``FIRST`` gives everything.

        Raises:
            MessageError: An id cannot be one of a job.
        """
        for job_id in after:
            check_job_id(job_id)
        subscription = Subscription(self, after)
        subscription.read_on()
        return subscription

    def read(self, subscription: Subscription, job_id: str, after: str) -> "_Reader":
        """Let a reader that has room read a channel for a subscription."""
        for reader in self._readers:
            if reader.add(subscription, job_id, after):
                return reader
        reader = _Reader(self._redis, self._loop, self._ringers, self._prefix)
        self._readers.append(reader)
        reader.add(subscription, job_id, after)
        reader.start()
        return reader

    def stop(self) -> None:
        """Let all threads end; the client must have been told to stop."""
        for reader in self._readers:
            reader.stop()
        self._ringers.shutdown(wait=False)


class _Reader(threading.Thread):
    """Waits for events of up to a hundred channels with one command at a time."""

    def __init__(
        self, redis: Redis, loop: asyncio.AbstractEventLoop, ringers: Executor, prefix: str
    ) -> None:
        super().__init__(name="channels", daemon=True)
        self._redis = redis
        self._loop = loop
        self._ringers = ringers
        self._prefix = prefix
        self._bell = Bell(key=READER_BELL(secrets.token_hex(8), prefix=prefix))
        self._lock = threading.Lock()
        self._channels: dict[str, tuple[Subscription, str]] = {}
        self._num_changes = 0
        self._num_rung = 0
        self._stopped = threading.Event()
        # One reply at a time is on its way to the event loop: a thread that ran ahead of a busy
        # loop would fill the memory that a paused subscription is there to save.
        self._handover = threading.Semaphore(1)

    @property
    def num_channels(self) -> int:
        return len(self._channels)

    def add(self, subscription: Subscription, job_id: str, after: str) -> bool:
        """Read a channel too; False when there is no room, or it is read for somebody else."""
        with self._lock:
            if len(self._channels) >= CHANNELS_PER_READER or job_id in self._channels:
                return False
            self._channels[job_id] = subscription, after
            self._num_changes += 1
        self._ringers.submit(self._ring)
        return True

    def remove(self, job_id: str) -> None:
        """Read a channel no more; an event of it that is under way still arrives."""
        with self._lock:
            self._channels.pop(job_id, None)

    def stop(self) -> None:
        self._stopped.set()
        self._handover.release()

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._turn()
            except BrokerError as error:
                if not self._stopped.is_set():
                    logger.warning("channels_not_read error=%s", error)
                    self._leave_out_broken()
                    time.sleep(_BREATHER_S)
            except Exception:  # the top of a thread; at the end its connection is closed under it
                if self._stopped.is_set() or self._loop.is_closed():
                    return
                logger.exception("channels_not_read")
                time.sleep(_BREATHER_S)

    def _leave_out_broken(self) -> None:
        """Give up the channels that alone make the command fail: keys of a wrong type."""
        with self._lock:
            channels = dict(self._channels)
        for job_id, (subscription, place) in channels.items():
            try:
                read_events(self._redis, job_id, place, prefix=self._prefix)
            except MessageError:
                pass  # one bad entry, which is told where it is decoded
            except BrokerError as error:
                if error.retryable:
                    return
                self.remove(job_id)
                broken = MessageError(f"channel of job {job_id}: {error}")
                self._loop.call_soon_threadsafe(subscription.give_up, job_id, broken)

    def _turn(self) -> None:
        with self._lock:
            channels = dict(self._channels)
        after = {job_id: place for job_id, (_, place) in channels.items()}
        self._bell, found = read_channels(
            self._redis, after, self._bell, _BLOCK_S, prefix=self._prefix
        )
        if not found:
            return
        with self._lock:
            for job_id, entries in found.items():
                subscription = channels[job_id][0]
                if self._channels.get(job_id, (None,))[0] is subscription:
                    self._channels[job_id] = subscription, entries[-1][0].decode()
        arrived = [(channels[job_id][0], job_id, entries) for job_id, entries in found.items()]
        self._handover.acquire()
        self._loop.call_soon_threadsafe(self._deliver, arrived)

    def _deliver(self, arrived: Iterable[tuple[Subscription, str, Iterable[Any]]]) -> None:
        """Give entries to whom they are for; in the event loop."""
        for subscription, job_id, entries in arrived:
            subscription.deliver(job_id, entries)
        self._handover.release()

    def _ring(self) -> None:
        """Wake the thread, once for all changes up to now."""
        with self._lock:
            number = self._num_changes
            if number <= self._num_rung:
                return
            self._num_rung = number
        try:
            ring(self._redis, self._bell.key, number)
        except BrokerError as error:  # the thread looks again after its block
            logger.warning("bell_not_rung error=%s", error)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _place(event_id: str) -> tuple[int, int]:
    run, _, num_tokens = event_id.partition("-")
    return int(run), int(num_tokens)
