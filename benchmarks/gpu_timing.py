"""Seconds that a device takes for enqueued work, without the host's share."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_load import synchronise

Work = Callable[[], object]


def device_seconds(work: Work, device: torch.device, *, repeats: int, at_once: int = 1) -> float:
    """Return the median seconds of ``work``; it has run before.

    Args:
        work: Enqueues something, or computes it on a CPU.
        device: Where.
        repeats: Measurements.
        at_once: How often it is enqueued per measurement, so that the host is ahead of the device.
    """
    return statistics.median(_seconds(work, device, at_once) for _ in range(repeats))


def _seconds(work: Work, device: torch.device, at_once: int) -> float:
    synchronise(device)
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(at_once):
            work()
        return (time.perf_counter() - started) / at_once
    before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    before.record()
    for _ in range(at_once):
        work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1000 / at_once
