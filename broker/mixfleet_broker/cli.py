"""Commands of the broker: ``mixfleet queue``."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table

from mixfleet_broker.acl import acl_lines
from mixfleet_broker.jobs_cli import connected
from mixfleet_broker.options import setting_options
from mixfleet_broker.overview import ModelStatus, model_statuses
from mixfleet_broker.settings import Settings
from mixfleet_broker.shares import set_share, shares
from mixfleet_broker.shown import format_age


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, times in seconds.")
@setting_options("redis", "data_dir", "key_prefix")
@click.pass_context
def queue(ctx: click.Context, settings: Settings, as_json: bool) -> None:
    """Show the queue of each model: jobs by state, live workers, how long the next job waited.

    Listed are the models that are served, were served in the last days, or have jobs.
    """
    ctx.obj = settings
    if ctx.invoked_subcommand is not None:
        return
    with connected(settings) as redis:
        statuses = model_statuses(redis, prefix=settings.key_prefix)
    if as_json:
        click.echo(json.dumps([asdict(status) for status in statuses], indent=2))
    elif statuses:
        Console().print(_table(statuses))
    else:
        click.echo("No model is served, nor was one lately: start `mixfleet up` or a worker.")


@queue.command()
@click.argument("tenant", required=False)
@click.argument("share", type=float, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def weight(settings: Settings, tenant: str | None, share: float | None, as_json: bool) -> None:
    """Show the tenants whose share is not 1, or give TENANT a SHARE of the fleet."""
    if tenant is not None and share is None:
        raise click.UsageError("a tenant needs a share: mixfleet queue weight TENANT 2")
    with connected(settings) as redis:
        if tenant is not None and share is not None:
            set_share(redis, tenant, share, prefix=settings.key_prefix)
        found = shares(redis, prefix=settings.key_prefix)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        click.echo(f"{name}: {value:g}")
    if not found:
        click.echo("all tenants share alike")


@queue.command()
@click.pass_obj
def acl(settings: Settings) -> None:
    """Print users of least privilege for Redis 7 or newer, for its file of users."""
    click.echo("\n".join(acl_lines(settings.key_prefix)))


def _table(statuses: Sequence[ModelStatus]) -> Table:
    table = Table("model", box=None, pad_edge=False, header_style="bold")
    headings = ("queued", "tokens", "started", "finished", "failed", "workers", "slots")
    for heading in (*headings, "oldest queued"):
        table.add_column(heading, justify="right")
    for status in statuses:
        waiting_in_vain = status.num_queued and not status.num_workers
        table.add_row(
            status.model,
            str(status.num_queued),
            str(status.queued_tokens),
            str(status.num_started),
            str(status.num_finished),
            f"[red]{status.num_failed}[/]" if status.num_failed else "0",
            "[red]0[/]" if waiting_in_vain else str(status.num_workers),
            str(status.num_slots),
            "-" if status.oldest_queued_s is None else format_age(status.oldest_queued_s),
        )
    return table
