"""How one engine is measured, the same way for all: standard library only.

A peer's program runs in the peer's own environment and shares this file, so that what is timed
differs in nothing but the engine.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

Prompt = list[int]

BATCHES = (1, 4, 8, 16, 32)
DECODE_STEPS = 24
PREFILL, TTFT, DECODE, WARMUP, OVERHEAD = range(5)
"""What a prompt is for: part of its seed, so that no two prompts of a run are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one process measures."""

    variant: str
    """Which way to run the engine; each engine has its own words."""
    model_path: str
    """A checkpoint folder, or a GGUF file."""
    vocab_size: int
    threads: int
    started_at: float
    """Epoch seconds at which the process was started."""
    batches: tuple[int, ...] = BATCHES
    decode_steps: int = DECODE_STEPS
    repeats: int = 3
    """Prefills timed per length."""
    prefill_tokens: int = 512
    ttft_tokens: int = 128
    prompt_tokens: int = 16
    """Length of a prompt where decoding is timed."""
    contexts: tuple[int, ...] = ()
    """Context lengths at which a decode step is timed too, where the engine can."""
    folder: str = ""
    """The peer's own folder."""

    @classmethod
    def from_arguments(cls) -> tuple[Self, Path]:
        """Return the job in the file that ``sys.argv`` names first, and where its result goes."""
        found = json.loads(Path(sys.argv[1]).read_text())
        for name in ("batches", "contexts"):
            found[name] = tuple(found[name])
        return cls(**found), Path(sys.argv[2])

    def write(self, path: Path) -> None:
        """Write the file that :meth:`from_arguments` reads."""
        path.write_text(json.dumps(asdict(self)))

    def prompts(self, purpose: int, batch: int, num_tokens: int, repeat: int = 0) -> list[Prompt]:
        """Return ``batch`` random prompts, the same for every engine and no two alike."""
        key = f"{purpose} {batch} {num_tokens} {repeat}"
        source = random.Random(key)
        # The first few ids are control tokens in every vocabulary.
        return [
            [source.randrange(300, self.vocab_size) for _ in range(num_tokens)]
            for _ in range(batch)
        ]


class Subject(Protocol):
    """An engine inside this process."""

    def start(self, prompts: Sequence[Prompt]) -> None:
        """Run ``prompts`` until each has its first token."""
        ...

    def step(self) -> None:
        """Give every one of them its next token."""
        ...

    def finish(self) -> None:
        """Forget them."""
        ...


def measure(job: Job, load: Callable[[], Subject]) -> tuple[dict[str, Any], Subject]:
    """Return the figures of the engine that ``load`` gives, and that engine."""
    subject = load()
    ready_s = time.time() - job.started_at
    subject.start(job.prompts(WARMUP, 1, job.prompt_tokens))
    figures: dict[str, Any] = {"ready_s": ready_s, "startup_s": time.time() - job.started_at}
    subject.step()
    subject.finish()
    time_prefills(job, subject, WARMUP, job.prefill_tokens)
    prefills = time_prefills(job, subject, PREFILL, job.prefill_tokens)
    figures["prefill_tokens_per_s"] = job.prefill_tokens / statistics.median(prefills)
    figures["ttft_s"] = statistics.median(time_prefills(job, subject, TTFT, job.ttft_tokens))
    figures["decode"] = {
        str(batch): rates(decode_times(job, subject, batch), batch) for batch in job.batches
    }
    figures["peak_rss_bytes"], figures["anonymous_bytes"] = memory()
    return figures, subject


def time_prefills(job: Job, subject: Subject, purpose: int, num_tokens: int) -> list[float]:
    """Return the seconds from a prompt of ``num_tokens`` to its first token, once a repeat."""
    times = []
    for repeat in range(1 if purpose == WARMUP else job.repeats):
        prompts = job.prompts(purpose, 1, num_tokens, repeat)
        started = time.perf_counter()
        subject.start(prompts)
        times.append(time.perf_counter() - started)
        subject.finish()
    return times


def decode_times(
    job: Job, subject: Subject, batch: int, num_tokens: int | None = None, steps: int | None = None
) -> list[float]:
    """Return the seconds of each decode step of ``batch`` sequences, two to warm up left out."""
    subject.start(job.prompts(DECODE, batch, num_tokens or job.prompt_tokens))
    times = []
    for _ in range(2 + (steps or job.decode_steps)):
        started = time.perf_counter()
        subject.step()
        times.append(time.perf_counter() - started)
    subject.finish()
    return times[2:]


def rates(times: Iterable[float], batch: int) -> dict[str, float]:
    """Return tokens per second: of the median step, and of the middle of the fastest third.

    On a shared machine other people's work lands on some steps; the fastest third shows little
    of it.
    """
    ordered = sorted(times)
    fastest = ordered[: max(1, len(ordered) // 3)]
    return {
        "tokens_per_s": batch / statistics.median(ordered),
        "best_third_tokens_per_s": batch / statistics.median(fastest),
    }


def memory() -> tuple[int, int]:
    """Return this process's largest resident size, and what of it now is no mapped file, in bytes.

    (0, 0) where the system has no ``/proc``.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return int(sizes["VmHWM"][0]) * 1024, int(sizes["RssAnon"][0]) * 1024
