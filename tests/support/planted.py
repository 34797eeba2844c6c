"""What a malicious producer could leave in Redis: bytes and names that run something.

What they run is harmless and leaves a trace: an empty directory, the marker.
"""

import base64
import os
import pickle
from pathlib import Path

from redis import Redis

from mixfleet_broker.keys import JOB, RESULTS

CALLBACK = "left_behind.callback"
MODULE = """import os

os.makedirs(os.environ["PLANTED_MARKER"], exist_ok=True)


def callback(*arguments):
    os.makedirs(os.environ["PLANTED_MARKER"], exist_ok=True)
"""
"""Leaves its trace when it is imported, and when it is called."""


class _Directory:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._path),)


def planted_pickle(marker: Path) -> bytes:
    """A pickle that makes the directory ``marker`` when it is loaded."""
    return pickle.dumps(_Directory(marker))


def plant(redis: Redis, job_id: str, field: str, marker: Path) -> None:
    """Put the worst that there is into one field of a job, or into its results."""
    if field.endswith("_callback_name"):
        redis.hset(JOB(job_id), field, CALLBACK)
    elif field == "return_value":
        value = base64.b64encode(planted_pickle(marker))
        redis.xadd(RESULTS(job_id), {"type": 1, "return_value": value})
    else:
        redis.hset(JOB(job_id), field, planted_pickle(marker))


def plant_module(directory: Path) -> str:
    """Write the module that ``CALLBACK`` names; return the PYTHONPATH that finds it."""
    (directory / "left_behind.py").write_text(MODULE)
    return str(directory)
