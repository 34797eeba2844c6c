"""Directories that appear complete or not at all."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file ``path``; at most one process on this machine does at a time.

    The system lets go of it when the process ends, however it ends. The file stays.

    Args:
        path: The lock file; its directory is made if need be.
        on_wait: Called once if somebody else holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Give a directory to be filled that becomes ``target`` when the block ends without an error.

    It is made beside ``target``, on the same disk, so that the last step is one rename. What an
    earlier, killed process left behind is removed first; hence one process at a time per target.

    Raises:
        FileExistsError: ``target`` is there already.
    """
    if target.exists():
        raise FileExistsError(target)
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        _sync(staging)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _sync(directory: Path) -> None:
    """Put all files on the disk, so that a power cut after the rename cannot leave holes."""
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
