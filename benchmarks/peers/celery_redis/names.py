"""Names that Celery's processes and those who start them share; nothing is imported here."""

from typing import Final

TASKS: Final = "benchmarks.peers.celery_redis.tasks"
URL_VARIABLE: Final = "BENCH_CELERY_BROKER"
QUEUE: Final = "celery"
"""Celery's default queue, a list of this name in Redis."""
UNACKED: Final = "unacked"
"""A hash in Redis: what its workers have fetched and not begun."""
