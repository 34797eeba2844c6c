"""``mixfleet key``: make API keys for the gateway, look at them, change and revoke them."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click
from redis import Redis
from rich.console import Console
from rich.table import Table

from mixfleet_broker.api_keys import ApiKeys
from mixfleet_broker.jobs_cli import connected
from mixfleet_broker.key_options import FOR_EVER, read_duration, term_options, with_given
from mixfleet_broker.key_records import KeyRecord, KeyTerms
from mixfleet_broker.limits import KeyLimits, LimitState
from mixfleet_broker.options import setting_options
from mixfleet_broker.settings import Settings

_WHERE = ("redis", "data_dir", "key_prefix")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, times as Unix times.")


@click.group()
def key() -> None:
    """Make API keys for the gateway, look at them, change, replace and revoke them."""


@key.command()
@click.option("--name", required=True, help="For people: whose key it is.")
@term_options
@_JSON
@setting_options(*_WHERE)
def create(settings: Settings, name: str, given: Mapping[str, Any], as_json: bool) -> None:
    """Make a key and print its secret, which is shown this once."""
    terms = with_given(KeyTerms(name=name), given)
    life_s = None if given["expires"] in (None, FOR_EVER) else given["expires"]
    with connected(settings) as redis:
        record, secret = _keys(redis, settings).create(terms, life_s)
    _print_secret(record.key_id, secret, as_json=as_json, details=_plain(record))


@key.command(name="ls")
@_JSON
@setting_options(*_WHERE)
def list_command(settings: Settings, as_json: bool) -> None:
    """List all keys, also those that are revoked or expired."""
    with connected(settings) as redis:
        records = _keys(redis, settings).all()
    if as_json:
        click.echo(json.dumps([_plain(record) for record in records], indent=2))
    elif records:
        Console(markup=False).print(_table(records))
    else:
        click.echo("no API keys: the gateway asks for none")


@key.command()
@click.argument("key_id")
@_JSON
@setting_options(*_WHERE)
def show(settings: Settings, key_id: str, as_json: bool) -> None:
    """Show one key: what it may do, and how far its limits are used."""
    with connected(settings) as redis:
        record = _keys(redis, settings).get(key_id)
        states = KeyLimits(redis, prefix=settings.key_prefix).states(record)
    if as_json:
        used = [asdict(state) for state in states]
        click.echo(json.dumps({**_plain(record), "used": used}, indent=2))
        return
    _print_record(record, states)


@key.command()
@click.argument("key_ids", nargs=-1, required=True)
@click.option("--forget", is_flag=True, help="Keep nothing of it, not even in the list.")
@setting_options(*_WHERE)
def revoke(settings: Settings, key_ids: Sequence[str], forget: bool) -> None:
    """Take keys out of use for good; gateways refuse them a second later."""
    with connected(settings) as redis:
        keys = _keys(redis, settings)
        for key_id in key_ids:
            keys.revoke(key_id, forget=forget)
            click.echo(f"{key_id}: {'revoked and forgotten' if forget else 'revoked'}")


@key.command()
@click.argument("key_id")
@click.option(
    "--grace",
    metavar="TIME",
    callback=read_duration,
    help="How long the secret of now stays valid too, as 12h or 7d.  [default: not at all]",
)
@_JSON
@setting_options(*_WHERE)
def rotate(settings: Settings, key_id: str, grace: float | None, as_json: bool) -> None:
    """Give a key a new secret and print it; it is shown this once."""
    with connected(settings) as redis:
        secret = _keys(redis, settings).rotate(key_id, grace or 0.0)
    _print_secret(key_id, secret, as_json=as_json, details={"key_id": key_id})


@key.command(name="set")
@click.argument("key_id")
@click.option("--name", help="For people: whose key it is.")
@term_options
@_JSON
@setting_options(*_WHERE)
def set_command(
    settings: Settings, key_id: str, name: str | None, given: Mapping[str, Any], as_json: bool
) -> None:
    """Change what a key may do; what is not named stays as it is."""
    expires = given["expires"]
    with connected(settings) as redis:
        keys = _keys(redis, settings)
        before = keys.get(key_id)
        after = with_given(before, {**given, "name": name})
        life_s = None if expires == FOR_EVER else expires
        record = keys.change(before, after, life_s=life_s, for_ever=expires == FOR_EVER)
        states = KeyLimits(redis, prefix=settings.key_prefix).states(record)
    if as_json:
        click.echo(json.dumps(_plain(record), indent=2))
    else:
        _print_record(record, states)


def _keys(redis: Redis, settings: Settings) -> ApiKeys:
    return ApiKeys(redis, prefix=settings.key_prefix)


def _print_secret(key_id: str, secret: str, *, as_json: bool, details: dict[str, Any]) -> None:
    if as_json:
        click.echo(json.dumps({**details, "secret": secret}, indent=2))
        return
    click.echo(secret)
    # Beside the secret on stdout, so that `mixfleet key create ... > file` keeps it alone.
    click.echo(f"{key_id}: keep this secret, it is not shown again", err=True)


def _plain(record: KeyRecord) -> dict[str, Any]:
    """Return a record as JSON takes it."""
    plain = asdict(record)
    return plain | {name: sorted(plain[name]) for name in ("scopes", "models")}


def _state(record: KeyRecord) -> str:
    if record.revoked_at is not None:
        return "revoked"
    return "expired" if record.is_expired(time.time()) else "valid"


def _print_record(record: KeyRecord, states: Sequence[LimitState]) -> None:
    plain = _plain(record)
    limits = plain.pop("limits")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("key", plain.pop("key_id"))
    table.add_row("state", _state(record))
    for name, value in (plain | limits).items():
        if value not in (None, []):
            table.add_row(name, _shown(name, value))
    for state in states:
        table.add_row(f"{state.name} left", f"{state.remaining} of {state.limit}")
    Console(markup=False).print(table)


def _shown(name: str, value: Any) -> str:
    if name.endswith(("_at", "_until")):
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return ", ".join(value) if isinstance(value, list) else str(value)


def _table(records: Sequence[KeyRecord]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("key", "state", "priority"):
        table.add_column(heading, no_wrap=True)
    for heading in ("rpm", "tpm", "tpd", "jobs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("scopes", "name", "models", "tenant"):
        table.add_column(heading, overflow="fold")
    for record in records:
        limits = record.limits
        numbers = (limits.requests_per_min, limits.tokens_per_min, limits.tokens_per_day)
        table.add_row(
            *(record.key_id, _state(record), record.priority),
            *("-" if n is None else str(n) for n in (*numbers, limits.max_parallel_jobs)),
            *(" ".join(sorted(record.scopes)), record.name),
            " ".join(sorted(record.models)) or "all",
            "own" if record.tenant == record.key_id else record.tenant,
        )
    return table
