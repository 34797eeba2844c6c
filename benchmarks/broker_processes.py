"""Functions run at the same time, each in a process of its own, on a common start."""

import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Final, Protocol

START_S: Final = 60.0
"""Longest time that a process may take to import what it needs and to connect."""

_ABANDONED: Final = "another process did not start"
"""Sent by those who waited for one that failed, whose own word counts."""


class ProcessError(Exception):
    """A process of the benchmark failed; the text is its own."""


class Ready(Protocol):
    """Waits until all processes are ready; returns when that was, in monotonic seconds.

    All get the same time.
    """

    def __call__(self) -> float:
        """Wait."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """A function of a module's top level; its first argument is a :class:`Ready`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = field(default=())


def run_together(calls: Sequence[Call], *, timeout_s: float) -> list[Any]:
    """Return what the calls return, in order.

    Args:
        calls: What each process does.
        timeout_s: From the common start to the last result.

    Raises:
        ProcessError: One failed, or took too long.
    """
    context = multiprocessing.get_context("spawn")
    barrier, start = context.Barrier(len(calls)), context.Value("d", 0.0)
    receivers: list[Connection] = []
    processes = []
    for call in calls:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run, args=(sender, barrier, start, call.function, call.arguments), daemon=True
        )
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    try:
        return _results(receivers, time.monotonic() + START_S + timeout_s)
    finally:
        for process, receiver in zip(processes, receivers, strict=True):
            process.kill()
            process.join()
            receiver.close()


def _results(receivers: Sequence[Connection], deadline: float) -> list[Any]:
    """Return what the processes send; the first failure ends the wait for all."""
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        left = [one for i, one in enumerate(receivers) if i not in results]
        found = wait(left, max(0.0, deadline - time.monotonic()))
        if not found:
            raise ProcessError("a process of the benchmark is not ready in time")
        for i, receiver in enumerate(receivers):
            if receiver in found:
                results[i] = _receive(receiver)
    if _ABANDONED in results.values():
        raise ProcessError(f"a process of the benchmark did not start within {START_S:g} s")
    return [results[i] for i in range(len(receivers))]


def _receive(receiver: Connection) -> Any:
    try:
        failed, value = receiver.recv()
    except EOFError:
        raise ProcessError("a process of the benchmark died") from None
    if failed:
        raise ProcessError(value)
    return value


def _run(
    sender: Connection,
    barrier: Any,
    start: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    def ready() -> float:
        barrier.wait(START_S)
        with start.get_lock():
            start.value = start.value or time.monotonic()  # the first one says when it was
            return float(start.value)

    try:
        sender.send((False, function(ready, *arguments)))
    except threading.BrokenBarrierError:
        sender.send((False, _ABANDONED))
    except Exception:  # the top of a process: whoever started it raises this again
        barrier.abort()
        sender.send((True, traceback.format_exc()))
