"""Reads the next things from disk in a thread while the caller works on the last ones."""

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Reads by name, in the order of ``names``, and keeps what was read until it is taken.

    The caller may take in another order: what it waits for is read even if that breaks the limit.
    A name that cannot be read ahead is read when it is taken, so its error is the caller's.

    Args:
        read: Reads one; called in the thread, and in the caller's for what the thread left.
        names: What will be taken, each once.
        num_bytes: Size of one that was read.
        max_bytes: The thread begins no other while it keeps as much as this.
    """

    def __init__(
        self,
        read: Callable[[str], T],
        names: Sequence[str],
        *,
        num_bytes: Callable[[T], int],
        max_bytes: int,
    ) -> None:
        self._read = read
        self._num_bytes = num_bytes
        self._max_bytes = max_bytes
        self._kept: dict[str, T] = {}
        self._kept_bytes = 0
        self._to_come = set(names)
        self._is_awaited = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._run, args=(tuple(names),), name="read-ahead", daemon=True
        )
        self._thread.start()

    def take(self, name: str) -> T:
        """Return what ``name`` reads; it is no longer kept."""
        with self._changed:
            self._is_awaited = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: name in self._kept or name not in self._to_come)
            self._is_awaited = False
            if name in self._kept:
                found = self._kept.pop(name)
                self._kept_bytes -= self._num_bytes(found)
                self._changed.notify_all()
                return found
        return self._read(name)

    def close(self) -> None:
        """Stop the thread and drop what it kept; whatever is taken later is read then."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._kept.clear()

    def _run(self, names: Sequence[str]) -> None:
        try:
            for name in names:
                with self._changed:
                    self._changed.wait_for(self._may_read)
                    if self._is_closed:
                        return
                self._keep(name, self._read(name))
        except Exception:  # the caller reads it itself and gets the error where it can be handled
            return
        finally:
            with self._changed:
                self._to_come.clear()
                self._changed.notify_all()

    def _may_read(self) -> bool:
        return self._is_closed or self._is_awaited or self._kept_bytes < self._max_bytes

    def _keep(self, name: str, found: T) -> None:
        with self._changed:
            self._to_come.remove(name)
            self._kept[name] = found
            self._kept_bytes += self._num_bytes(found)
            self._changed.notify_all()
