"""The clients of the gateway's benchmark: thousands of streams from one process, by little code.

Three ways to the same text: over HTTP as OpenAI's clients read it, from the channels in Redis, and
by asking every 0.3 s for all of it, as AIME's clients do. The parsing is as little as can be, so
that what is measured is the gateway and not its clients.
"""

import asyncio
import json
import re
import threading
import time
from array import array
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks.broker_jobs import MODEL, bench_queue
from benchmarks.broker_processes import Ready
from benchmarks.broker_writers import STAMP, age_ms
from mixfleet_broker.channel import FIRST, Bell, decode_entry, read_channels
from mixfleet_broker.connection import connect
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    JobEnd,
    SamplingSettings,
    TokenChunk,
    new_job_id,
)
from mixfleet_broker.terms import JobTerms

QUESTION: Final = "Tell a long story."
CHANNELS: Final = 100
POLL_S: Final = 0.3
_SPREAD_S: Final = 4.0
"""Over which the streams begin."""
_STAMP: Final = re.compile(rb'"content":"([0-9a-f]{13})"')
_BLOCK_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the clients do."""

    streams: int
    tokens: int
    warmup_s: float
    """Chunks before this count for nothing but the time to the first one."""
    limit_s: float


@dataclass(slots=True)
class Seen:
    """What came."""

    ttft_ms: "array[float]" = field(default_factory=lambda: array("d"))
    chunk_ms: "array[float]" = field(default_factory=lambda: array("d"))
    num_chunks: int = 0
    num_ended: int = 0
    cpu_s: float = 0.0
    lasted_s: float = 0.0


def over_http(ready: Ready, port: int, plan: Plan) -> Seen:
    """Read all streams from the gateway."""
    return asyncio.run(_over_http(ready, port, plan))


async def _over_http(ready: Ready, port: int, plan: Plan) -> Seen:
    start, seen, cpu_s = ready(), Seen(), time.process_time()
    body = json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "max_tokens": plan.tokens,
            "messages": [{"role": "user", "content": QUESTION}],
        }
    ).encode()
    async with asyncio.timeout(plan.limit_s):
        await asyncio.gather(
            *(
                _stream(port, body, start, start + _SPREAD_S * i / plan.streams, plan, seen)
                for i in range(plan.streams)
            )
        )
    seen.cpu_s, seen.lasted_s = time.process_time() - cpu_s, time.monotonic() - start
    return seen


async def _stream(
    port: int, body: bytes, start: float, begin: float, plan: Plan, seen: Seen
) -> None:
    await asyncio.sleep(max(0.0, begin - time.monotonic()))
    sent = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request("POST", "/v1/chat/completions", body))
    is_first = True
    while data := await reader.read(65536):
        now = time.monotonic()
        for text in _STAMP.findall(data):
            seen.num_chunks += 1
            if is_first:
                is_first = False
                seen.ttft_ms.append(1000 * (now - sent))
            elif now > start + plan.warmup_s:
                seen.chunk_ms.append(age_ms(text.decode(), round(now * 1e6)))
        if b"[DONE]" in data:
            seen.num_ended += 1
            break
    writer.close()


def _request(method: str, path: str, body: bytes) -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def requests(ready: Ready, port: int, concurrency: int, run_s: float) -> Seen:
    """Ask short questions without streaming, one after the other on each connection."""
    return asyncio.run(_requests(ready, port, concurrency, run_s))


async def _requests(ready: Ready, port: int, concurrency: int, run_s: float) -> Seen:
    start, seen, cpu_s = ready(), Seen(), time.process_time()
    body = json.dumps(
        {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    ).encode()
    request = _request("POST", "/v1/chat/completions", body)

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < start + run_s:
            sent = time.monotonic()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"content-length: (\d+)", head)
            if found is None or b" 200 " not in head:
                raise RuntimeError(f"no answer: {head[:200]!r}")
            await reader.readexactly(int(found[1]))
            seen.ttft_ms.append(1000 * (time.monotonic() - sent))
            seen.num_ended += 1
        writer.close()

    await asyncio.gather(*(ask() for _ in range(concurrency)))
    seen.cpu_s, seen.lasted_s = time.process_time() - cpu_s, time.monotonic() - start
    return seen


def from_channels(ready: Ready, url: str, plan: Plan) -> Seen:
    """Submit the same jobs and read their channels, a hundred on each connection."""
    redis = connect(url)
    queue = bench_queue(redis)
    start, seen, cpu_s = ready(), Seen(), time.process_time()
    groups: list[dict[str, float]] = [{} for _ in range((plan.streams + CHANNELS - 1) // CHANNELS)]
    jobs = [_job(plan.tokens) for _ in range(plan.streams)]
    for i, job in enumerate(jobs):
        groups[i // CHANNELS][job.job_id] = 0.0
    lock = threading.Lock()
    readers = [
        threading.Thread(target=_read_group, args=(url, group, start, plan, seen, lock))
        for group in groups
    ]
    for reader in readers:
        reader.start()
    for i, job in enumerate(jobs):
        time.sleep(max(0.0, start + _SPREAD_S * i / plan.streams - time.monotonic()))
        groups[i // CHANNELS][job.job_id] = time.monotonic()
        queue.submit(job, JobTerms())
    for reader in readers:
        reader.join()
    seen.cpu_s, seen.lasted_s = time.process_time() - cpu_s, time.monotonic() - start
    return seen


def _read_group(
    url: str,
    sent: dict[str, float],
    start: float,
    plan: Plan,
    seen: Seen,
    lock: threading.Lock,
) -> None:
    redis = connect(url)
    after = dict.fromkeys(sent, FIRST)
    bell, first = Bell(key="bench:bell"), set(sent)
    while after and time.monotonic() < start + plan.limit_s:
        bell, found = read_channels(redis, after, bell, _BLOCK_S)
        now = time.monotonic()
        for job_id, entries in found.items():
            for entry in entries:
                after[job_id], event = decode_entry(entry)
                if isinstance(event, TokenChunk):
                    with lock:
                        seen.num_chunks += 1
                        if job_id in first:
                            first.discard(job_id)
                            seen.ttft_ms.append(1000 * (now - sent[job_id]))
                        elif now > start + plan.warmup_s:
                            seen.chunk_ms.append(age_ms(event.text, round(now * 1e6)))
                elif isinstance(event, JobEnd):
                    seen.num_ended += 1
                    del after[job_id]


def _job(tokens: int) -> ChatJob:
    return ChatJob(
        job_id=new_job_id(),
        model=MODEL,
        messages=(ChatMessage(role="user", content=QUESTION),),
        sampling=SamplingSettings(max_tokens=tokens),
    )


def by_polling(ready: Ready, port: int, plan: Plan) -> Seen:
    """Submit to AIME's routes, and ask for all text so far every 0.3 s."""
    return asyncio.run(_by_polling(ready, port, plan))


async def _by_polling(ready: Ready, port: int, plan: Plan) -> Seen:
    start, seen, cpu_s = ready(), Seen(), time.process_time()
    async with asyncio.timeout(plan.limit_s):
        await asyncio.gather(
            *(
                _poll(port, start, start + _SPREAD_S * i / plan.streams, plan, seen)
                for i in range(plan.streams)
            )
        )
    seen.cpu_s, seen.lasted_s = time.process_time() - cpu_s, time.monotonic() - start
    return seen


async def _poll(port: int, start: float, begin: float, plan: Plan, seen: Seen) -> None:
    await asyncio.sleep(max(0.0, begin - time.monotonic()))
    sent = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asked = {"prompt_input": QUESTION, "max_gen_tokens": plan.tokens, "wait_for_result": False}
    job_id = (await _ask(reader, writer, f"/{MODEL}", asked))["job_id"]
    length = 0
    while True:
        await asyncio.sleep(POLL_S)
        found = await _ask(reader, writer, f"/{MODEL}/progress", {"job_id": job_id})
        now = time.monotonic()
        is_done = found["job_state"] == "done"
        told = found["job_result"] if is_done else found["progress"]["progress_data"]
        text = told.get("text", "") if told else ""
        for at in range(length, len(text), STAMP):
            seen.num_chunks += 1
            if at == 0:
                seen.ttft_ms.append(1000 * (now - sent))
            elif now > start + plan.warmup_s:
                seen.chunk_ms.append(age_ms(text[at : at + STAMP], round(now * 1e6)))
        length = len(text)
        if is_done:
            seen.num_ended += 1
            writer.close()
            return


async def _ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, value: object
) -> dict[str, Any]:
    writer.write(_request("POST", path, json.dumps(value).encode()))
    head = await reader.readuntil(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    if found is None or b" 200 " not in head:
        raise RuntimeError(f"no answer: {head[:300]!r}")
    answer: dict[str, Any] = json.loads(await reader.readexactly(int(found[1])))
    return answer
