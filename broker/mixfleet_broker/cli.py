"""Commands of the broker: `mixfleet queue`."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

from mixfleet_broker.connection import connect, find_redis_url
from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.options import setting_options
from mixfleet_broker.overview import ModelStatus, model_statuses
from mixfleet_broker.settings import Settings

_MINUTE_S = 60
_HOUR_S = 3600


@click.command()
@setting_options("redis", "data_dir")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, times in seconds.")
def queue(settings: Settings, as_json: bool) -> None:
    """Show the queue of each model: jobs by state, live workers, how long the next job waited.

    Listed are the models that are served, were served in the last days, or have jobs.
    """
    try:
        with connect(find_redis_url(settings)) as redis:
            statuses = model_statuses(redis)
    except MixfleetError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps([asdict(status) for status in statuses], indent=2))
    elif statuses:
        Console().print(_table(statuses))
    else:
        click.echo("No model is served, nor was one lately: start `mixfleet up` or a worker.")


def _table(statuses: Sequence[ModelStatus]) -> Table:
    table = Table("model", box=None, pad_edge=False, header_style="bold")
    for heading in ("queued", "started", "finished", "failed", "workers", "oldest queued"):
        table.add_column(heading, justify="right")
    for status in statuses:
        waiting_in_vain = status.num_queued and not status.num_workers
        table.add_row(
            status.model,
            str(status.num_queued),
            str(status.num_started),
            str(status.num_finished),
            f"[red]{status.num_failed}[/]" if status.num_failed else "0",
            "[red]0[/]" if waiting_in_vain else str(status.num_workers),
            "-" if status.oldest_queued_s is None else format_age(status.oldest_queued_s),
        )
    return table


def format_age(seconds: float) -> str:
    """Return a length of time for people: ``0.4 s``, ``12 s``, ``3 min``, ``2.5 h``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 2 * _MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR_S:
        return f"{seconds / _MINUTE_S:.0f} min"
    return f"{seconds / _HOUR_S:.1f} h"
