"""One ``mixfleet up`` for a data directory, and why one cannot be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixfleet_broker.server_directory import FileLock


class UpError(Exception):
    """The fleet cannot be started; the text says why and what to do."""


@contextmanager
def only_one(data_dir: Path) -> Iterator[None]:
    """Hold the lock of the data directory.

    Raises:
        UpError: Another ``mixfleet up`` holds it, or it cannot be made or written.
    """
    path = data_dir / "up.lock"
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
    except OSError as error:
        raise UpError(f"data_dir={data_dir}: {error.strerror}; give another --data-dir") from error
    if not lock.try_acquire():
        raise UpError(
            f"`mixfleet up` is running already for {data_dir} (process {path.read_text().strip()}):"
            " use it, end it, or give another --data-dir"
        )
    try:
        path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        lock.close()
