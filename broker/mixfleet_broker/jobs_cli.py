"""``mixfleet job``: look at jobs, cancel them, let failed ones run again."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import cast

import click
from redis import Redis
from rich.console import Console
from rich.table import Table

from mixfleet_broker.connection import connect, find_redis_url
from mixfleet_broker.errors import MixfleetError, UnknownJobError
from mixfleet_broker.jobs import MAX_PAGE, JobRow, find_job, list_jobs
from mixfleet_broker.messages import (
    JobState,
)
from mixfleet_broker.options import setting_options
from mixfleet_broker.overview import model_statuses
from mixfleet_broker.queue import CancelOutcome, JobQueue
from mixfleet_broker.settings import Settings
from mixfleet_broker.shown import format_age
from mixfleet_broker.terms import QueueRules

ID_WIDTH = 32
"""An id is there to be copied: it is never shortened."""
STATES = ("queued", "started", "finished", "failed", "canceled")


@click.group()
def job() -> None:
    """Look at jobs, cancel them, let failed ones run again."""


@job.command(name="ls")
@click.option("--state", type=click.Choice(STATES), default="queued", show_default=True)
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Jobs before the page.")
@click.option("--limit", type=click.IntRange(1, MAX_PAGE), default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, times as Unix times.")
@setting_options("redis", "data_dir", "key_prefix", "model")
def list_command(settings: Settings, state: str, offset: int, limit: int, as_json: bool) -> None:
    """List the jobs of one state, of one model or of all."""
    chosen = cast("JobState", state)
    with connected(settings) as redis:
        rows = [
            row
            for model in _models(redis, settings)
            for row in list_jobs(
                redis, model, chosen, offset=offset, limit=limit, prefix=settings.key_prefix
            )
        ]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif rows:
        Console(markup=False).print(_table(rows))
    else:
        click.echo(f"no {state} jobs")


@job.command()
@click.argument("job_id")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, times as Unix times.")
@setting_options("redis", "data_dir", "key_prefix")
def show(settings: Settings, job_id: str, as_json: bool) -> None:
    """Show one job: where it stands, and its runs so far."""
    with connected(settings) as redis:
        row = find_job(redis, job_id, prefix=settings.key_prefix)
        info = _queue(redis, row, settings).info(job_id)
    if as_json:
        click.echo(json.dumps({**asdict(row), "standing": asdict(info)}, indent=2))
        return
    details: list[tuple[str, object]] = [
        *((name, value) for name, value in asdict(row).items() if name != "history"),
        *((name, getattr(info, name)) for name in ("outlook", "position", "tokens_ahead", "eta_s")),
    ]
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in details:
        if value not in (None, ""):
            table.add_row(name, str(value))
    for run in row.history:
        table.add_row("run", f"{run.reason} on {run.worker_id} after {run.num_tokens} tokens")
    Console(markup=False).print(table)


@job.command()
@click.argument("job_ids", nargs=-1, required=True)
@click.option("--reason", default="cancelled by an operator", show_default=True)
@setting_options("redis", "data_dir", "key_prefix")
def cancel(settings: Settings, job_ids: Sequence[str], reason: str) -> None:
    """End jobs wherever they are; a running one stops within a step."""
    with connected(settings) as redis:
        for job_id in job_ids:
            row = find_job(redis, job_id, prefix=settings.key_prefix)
            outcome = _queue(redis, row, settings).cancel(job_id, reason)
            done = outcome is CancelOutcome.CANCELED
            click.echo(f"{job_id}: {'cancelled' if done else f'had {row.state} already'}")


@job.command()
@click.argument("job_ids", nargs=-1)
@click.option("--all-failed", is_flag=True, help="All failed jobs of the model.")
@setting_options("redis", "data_dir", "key_prefix", "model")
def requeue(settings: Settings, job_ids: Sequence[str], all_failed: bool) -> None:
    """Let failed jobs run again from nothing."""
    if bool(job_ids) == all_failed:
        raise click.UsageError("name jobs, or give --all-failed")
    with connected(settings) as redis:
        ids = list(job_ids) or _all_failed(redis, settings)
        for job_id in ids:
            row = find_job(redis, job_id, prefix=settings.key_prefix)
            done = _queue(redis, row, settings).requeue(job_id)
            click.echo(f"{job_id}: {'queued again' if done else f'is {row.state}, not failed'}")


@contextmanager
def connected(settings: Settings) -> Iterator[Redis]:
    """Give a client of the fleet's Redis; an error of ours becomes click's."""
    try:
        with connect(find_redis_url(settings)) as redis:
            yield redis
    except MixfleetError as error:
        raise click.ClickException(str(error)) from error


def _queue(redis: Redis, row: JobRow, settings: Settings) -> JobQueue:
    if not row.model:
        raise UnknownJobError(job_id=row.job_id)
    rules = QueueRules.from_settings(settings)
    return JobQueue(redis, row.model, rules, prefix=settings.key_prefix)


def _models(redis: Redis, settings: Settings) -> list[str]:
    if settings.model is not None:
        return [settings.model]
    return [status.model for status in model_statuses(redis, prefix=settings.key_prefix)]


def _all_failed(redis: Redis, settings: Settings) -> list[str]:
    found: list[str] = []
    for model in _models(redis, settings):
        offset = 0
        while page := list_jobs(
            redis, model, "failed", offset=offset, limit=MAX_PAGE, prefix=settings.key_prefix
        ):
            found += [row.job_id for row in page]
            offset += MAX_PAGE
    return found


def _table(rows: Sequence[JobRow]) -> Table:
    now = time.time()
    table = Table(box=None, pad_edge=False)
    table.add_column("job", no_wrap=True, min_width=ID_WIDTH)
    for heading in ("model", "tenant", "priority"):
        table.add_column(heading, overflow="fold")
    for heading in ("age", "worker", "runs", "lost", "reason"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        age = "-" if row.submitted_at is None else format_age(max(0.0, now - row.submitted_at))
        reason = f"{row.reason}: {row.message}" if row.message else row.reason
        table.add_row(
            *(row.job_id, row.model, row.tenant, row.priority, age, row.worker_id or "-"),
            *(str(row.attempt), str(row.num_losses), reason or "-"),
        )
    return table
