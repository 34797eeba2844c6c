"""Something that happens in a thread beside a block of a test."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def meanwhile(call: Callable[[], object]) -> Iterator[list[Any]]:
    """Run ``call`` in a thread beside the block; what it returns or raises is in the list."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # shown by the test, not lost in a thread
            results.append(error)

    # A daemon: one that waits for ever must not keep a failed test from ending.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield results
    thread.join(20)
    assert not thread.is_alive(), "it has not ended"
