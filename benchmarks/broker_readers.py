"""The readers of the chunk benchmark: how long after its append each chunk is in their hands."""

import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from redis import Redis

from benchmarks.broker_processes import Ready
from benchmarks.broker_writers import STAMP, Window, age_ms, topic
from mixfleet_broker.channel import MAX_EVENTS_PER_READ, read_events
from mixfleet_broker.connection import connect
from mixfleet_broker.event_codec import TOKENS, decode_event
from mixfleet_broker.keys import CHANNEL
from mixfleet_broker.messages import (
    MAX_COUNT,
    JobEvent,
    TokenChunk,
)
from mixfleet_broker.records import Lease

POLL_S: Final = 0.3
"""How often a client of AIME's asks for the text so far."""
_BLOCK_S: Final = 0.2
_SLOTS: Final = 30
"""Into which the polls of all clients are spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What one process of readers got."""

    latencies_ms: "array[float]"
    """Of the chunks that were appended while it was measured."""
    num_gaps: int
    """Chunks that did not follow the one before."""
    cpu_s: float
    """Processor time from the common start to the end."""


class _Hand:
    """Where chunks end up; one thread's."""

    def __init__(self, start: float, window: Window) -> None:
        self._from_us = round(1e6 * (start + window.warmup_s))
        self._to_us = round(1e6 * (start + window.end_s))
        self._counts: dict[str, int] = {}
        self.latencies_ms: array[float] = array("d")
        self.num_gaps = 0

    def take(self, text: str) -> None:
        """Note the latency of a chunk's text."""
        now_us = time.monotonic_ns() // 1000
        if self._from_us <= int(text, 16) < self._to_us:
            self.latencies_ms.append(age_ms(text, now_us))

    def take_event(self, job_id: str, event: JobEvent) -> None:
        """Note the latency of a chunk, and whether one is missing before it."""
        if isinstance(event, TokenChunk):
            self.take(event.text)
            self.num_gaps += event.num_tokens != self._counts.get(job_id, 0) + 1
            self._counts[job_id] = event.num_tokens


def read_streams(ready: Ready, url: str, groups: Sequence[Sequence[Lease]], window: Window) -> Read:
    """Read each group of channels over a connection of its own, in a thread of its own."""
    clients = [connect(url) for _ in groups]
    start, cpu_s = ready(), time.process_time()
    hands = [_Hand(start, window) for _ in groups]

    def read_group(i: int) -> None:
        read = _read_one(clients[i], groups[i][0]) if len(groups[i]) == 1 else None
        for job_id, event in read or _read_many(clients[i], groups[i]):
            if event is not None:
                hands[i].take_event(job_id, event)
            elif time.monotonic() > start + window.end_s:
                return

    _in_threads(read_group, len(groups))
    return _read(hands, cpu_s)


def _read_one(redis: Redis, lease: Lease) -> Iterator[tuple[str, JobEvent | None]]:
    """Iterate over a job's events as the client does; None where none came for a while."""
    position = f"{lease.run}-0"
    while True:
        events = read_events(redis, lease.job_id, position, _BLOCK_S)
        for event_id, event in events:
            yield lease.job_id, event
            position = event_id
        if not events:
            yield lease.job_id, None


def _read_many(redis: Any, leases: Sequence[Lease]) -> Iterator[tuple[str, JobEvent | None]]:
    """Iterate over the events of many jobs, all read with one command."""
    names = {CHANNEL(lease.job_id).encode(): lease.job_id for lease in leases}
    positions = {CHANNEL(lease.job_id).encode(): f"{lease.run}-0".encode() for lease in leases}
    block_ms = round(1000 * _BLOCK_S)
    while True:
        reply = redis.xread(positions, count=MAX_EVENTS_PER_READ, block=block_ms)
        for key, entries in reply or ():
            for event_id, fields in entries:
                run, _, num_tokens = event_id.partition(b"-")
                kind = fields[b"k"].decode()
                yield names[key], decode_event(kind, int(run), int(num_tokens), fields[b"d"])
            positions[key] = entries[-1][0]
        if not reply:
            yield "", None


def _in_threads(target: Callable[[int], None], num_threads: int) -> None:
    threads = [threading.Thread(target=target, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_pubsub(ready: Ready, url: str, groups: Sequence[Sequence[Lease]], window: Window) -> Read:
    """Subscribe to all channels over one connection."""
    topics = [topic(lease) for leases in groups for lease in leases]
    redis: Any = connect(url)
    subscription = redis.pubsub()
    subscription.subscribe(*topics)
    for _ in topics:
        subscription.get_message(timeout=5)
    start, cpu_s = ready(), time.process_time()
    hand = _Hand(start, window)
    while True:
        message = subscription.get_message(timeout=_BLOCK_S)
        if message is not None:
            # Which token it is stands in a stream's id, and here nowhere.
            event = decode_event(TOKENS, 1, MAX_COUNT, message["data"])
            if isinstance(event, TokenChunk):
                hand.take(event.text)
        elif time.monotonic() > start + window.end_s:
            return _read([hand], cpu_s)


def poll_snapshots(
    ready: Ready, url: str, groups: Sequence[Sequence[Lease]], window: Window
) -> Read:
    """Ask for the whole text of every job each 0.3 s, as AIME's clients do, in turns."""
    keys = [topic(lease) for leases in groups for lease in leases]
    redis: Any = connect(url)
    lengths = [0] * len(keys)
    start, cpu_s = ready(), time.process_time()
    hand, turn = _Hand(start, window), 0
    while (at := start + turn * POLL_S / _SLOTS) < start + window.end_s + POLL_S:
        time.sleep(max(0.0, at - time.monotonic()))
        places = range(turn % _SLOTS, len(keys), _SLOTS)
        with redis.pipeline(transaction=False) as pipeline:
            for i in places:
                pipeline.get(keys[i])
            texts = pipeline.execute()
        for i, text in zip(places, texts, strict=True):
            for at_byte in range(lengths[i], len(text or b""), STAMP):
                hand.take(text[at_byte : at_byte + STAMP].decode())
            lengths[i] = len(text or b"")
        turn += 1
    return _read([hand], cpu_s)


def _read(hands: Sequence[_Hand], cpu_s: float) -> Read:
    latencies_ms = array("d", (one for hand in hands for one in hand.latencies_ms))
    return Read(
        latencies_ms=latencies_ms,
        num_gaps=sum(hand.num_gaps for hand in hands),
        cpu_s=time.process_time() - cpu_s,
    )
