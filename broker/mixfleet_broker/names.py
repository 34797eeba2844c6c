"""What may be part of a key: names of models, workers and tenants, and ids of jobs."""

import re
from typing import Final

from mixfleet_broker.errors import MessageError

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_JOB_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")


def check_model_name(name: str) -> str:
    """Return ``name`` if it can name a model and its queue.

    Raises:
        MessageError: It is not 1 to 64 letters, digits, dots, underscores and dashes.
    """
    if not _NAME.fullmatch(name):
        raise MessageError(f"model={name[:80]!r}: must match {_NAME.pattern}")
    return name


def check_tenant(tenant: str) -> str:
    """Return ``tenant`` if it can name whose a job is.

    Raises:
        MessageError: It is not 1 to 64 letters, digits, dots, underscores and dashes.
    """
    if not _NAME.fullmatch(tenant):
        raise MessageError(f"tenant={tenant[:80]!r}: must match {_NAME.pattern}")
    return tenant


def check_worker_id(worker_id: str) -> str:
    """Return ``worker_id`` if it can name a worker.

    Raises:
        MessageError: It is not 1 to 64 letters, digits, dots, underscores and dashes.
    """
    if not _NAME.fullmatch(worker_id):
        raise MessageError(f"worker_id={worker_id[:80]!r}: must match {_NAME.pattern}")
    return worker_id


def check_job_id(job_id: str) -> str:
    """Return ``job_id`` if it can name a job.

    Raises:
        MessageError: It is not 1 to 128 letters, digits, underscores and dashes.
    """
    if not _JOB_ID.fullmatch(job_id):
        raise MessageError(f"job_id={job_id[:80]!r}: must match {_JOB_ID.pattern}")
    return job_id
