"""``mixfleet worker ls|pause|resume|drain``: look at workers and give them orders."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import click
from redis import Redis
from rich.console import Console
from rich.table import Table

from mixfleet_broker.jobs_cli import connected
from mixfleet_broker.options import setting_options
from mixfleet_broker.orders import give_order, withdraw_order
from mixfleet_broker.registry import WorkerRecord, workers
from mixfleet_broker.settings import Settings


@click.command(name="ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@setting_options("redis", "data_dir", "key_prefix", "model")
def list_workers(settings: Settings, as_json: bool) -> None:
    """List the live workers, of one model or of all."""
    with connected(settings) as redis:
        records = _chosen(redis, settings)
    if as_json:
        click.echo(json.dumps([asdict(record) for record in records], indent=2))
    elif records:
        Console(markup=False).print(_table(records))
    else:
        click.echo("no worker lives: start one with `mixfleet worker` or `mixfleet up`")


def _order_command(name: str, done: str, help_text: str) -> click.Command:
    @click.command(name=name, help=help_text)
    @click.argument("worker_ids", nargs=-1)
    @click.option("--all", "all_workers", is_flag=True, help="All live workers, or all of --model.")
    @setting_options("redis", "data_dir", "key_prefix", "model")
    def command(settings: Settings, worker_ids: Sequence[str], all_workers: bool) -> None:
        if bool(worker_ids) == all_workers:
            raise click.UsageError("name workers, or give --all")
        with connected(settings) as redis:
            ids = list(worker_ids) or [record.worker_id for record in _chosen(redis, settings)]
            for worker_id in ids:
                _ORDERS[name](redis, worker_id, settings.key_prefix)
                click.echo(f"{worker_id}: {done}")

    return command


_ORDERS: dict[str, Callable[[Redis, str, str], None]] = {
    "pause": lambda redis, worker_id, prefix: give_order(redis, worker_id, "pause", prefix=prefix),
    "drain": lambda redis, worker_id, prefix: give_order(redis, worker_id, "drain", prefix=prefix),
    "resume": lambda redis, worker_id, prefix: withdraw_order(redis, worker_id, prefix=prefix),
}

COMMANDS: tuple[click.Command, ...] = (
    list_workers,
    _order_command(
        "pause",
        "takes no more jobs until it is resumed",
        "Let workers take no more jobs; those that they have go on.",
    ),
    _order_command("resume", "takes jobs again", "Let paused workers take jobs again."),
    _order_command(
        "drain",
        "finishes its jobs and ends",
        "Let workers finish what they have, hand back what takes too long, and end.",
    ),
)


def _chosen(redis: Redis, settings: Settings) -> list[WorkerRecord]:
    records = workers(redis, prefix=settings.key_prefix)
    return [record for record in records if settings.model in (None, record.model)]


def _table(records: Sequence[WorkerRecord]) -> Table:
    table = Table("worker", "model", "state", box=None, pad_edge=False)
    for heading in ("in flight", "of", "context", "host", "process", "version"):
        table.add_column(heading, justify="right" if heading in ("in flight", "of") else "left")
    for record in records:
        row: list[Any] = [record.worker_id, record.model, record.state, record.in_flight]
        row += [record.max_batch_size, record.context_length, record.host, record.pid]
        table.add_row(*map(str, row), record.version)
    return table
