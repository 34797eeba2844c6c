"""What an operator says of an API key on the command line."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

import click

from mixfleet_broker.key_records import MOST, SCOPES, KeyTerms
from mixfleet_broker.terms import PRIORITIES

R = TypeVar("R")

NO_LIMIT: Final = 0
FOR_EVER: Final = math.inf
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_DURATION: Final = re.compile(r"(\d{1,9})([smhdw])")
_LIMITS: Final = {
    "rpm": ("requests_per_min", "Requests in a minute."),
    "tpm": ("tokens_per_min", "Tokens in a minute, of prompts and answers."),
    "tpd": ("tokens_per_day", "Tokens in a day of UTC."),
    "parallel": ("max_parallel_jobs", "Jobs waiting or running."),
    "queued": ("max_queued_jobs", "Jobs waiting for one model."),
    "queued_tokens": ("max_queued_tokens", "Tokens of jobs waiting for one model."),
}
"""The limit that each option sets, and its help."""


def read_limit(_context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """Return the number of a limit's option; ``none`` is :data:`NO_LIMIT`.

    Raises:
        click.BadParameter: It is neither.
    """
    if text is None:
        return None
    if text == "none":
        return NO_LIMIT
    most = MOST[_LIMITS[str(option.name)][0]]
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:20]) <= most):
        raise click.BadParameter(f"{text!r}: must be 'none' or a number from 1 to {most}")
    return int(text)


def read_duration(
    _context: click.Context, option: click.Parameter, text: str | None
) -> float | None:
    """Return a length of time in seconds; ``never`` of ``--expires`` is :data:`FOR_EVER`.

    Raises:
        click.BadParameter: It is neither.
    """
    if text is None:
        return None
    takes_never = option.name == "expires"
    if text == "never" and takes_never:
        return FOR_EVER
    found = _DURATION.fullmatch(text)
    if found is None:
        never = ", or 'never'" if takes_never else ""
        raise click.BadParameter(f"{text!r}: must be like 90s, 15m, 12h, 30d or 2w{never}")
    return float(int(found[1]) * _UNITS_S[found[2]])


def term_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add the options that say what a key may do; the command gets them as ``given``."""
    names = [*_LIMITS, "priority", "tenant", "scopes", "models", "all_models", "expires"]

    @functools.wraps(command)
    def with_terms(*args: Any, **parameters: Any) -> R:
        given = {name: parameters.pop(name) for name in names}
        return command(*args, given=given, **parameters)

    decorated: Callable[..., R] = with_terms
    for option in reversed(_options()):
        decorated = option(decorated)
    return decorated


def _options() -> list[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    limits = [
        click.option(
            f"--{name.replace('_', '-')}", metavar="N|none", callback=read_limit, help=text
        )
        for name, (_, text) in _LIMITS.items()
    ]
    return [
        *limits,
        click.option(
            "--priority",
            type=click.Choice(PRIORITIES),
            help="The highest that it may ask for, and its own.  [new keys: default]",
        ),
        click.option("--tenant", help="Whose its jobs are.  [new keys: the key's id]"),
        click.option(
            "--scope",
            "scopes",
            type=click.Choice(SCOPES),
            multiple=True,
            help="What it opens; may be given several times.  [new keys: chat]",
        ),
        click.option(
            "--model",
            "models",
            multiple=True,
            help="A model that it may use; may be given several times.  [new keys: all]",
        ),
        click.option("--all-models", is_flag=True, help="It may use all models."),
        click.option(
            "--expires",
            metavar="TIME",
            callback=read_duration,
            help="How long it is valid from now on: 12h, 30d, never.  [new keys: never]",
        ),
    ]


def with_given(terms: KeyTerms, given: Mapping[str, Any]) -> KeyTerms:
    """Return ``terms`` with what was given put in; what was not given stays.

    Raises:
        click.UsageError: The options contradict each other.
    """
    if given["models"] and given["all_models"]:
        raise click.UsageError("give --model or --all-models, not both")
    limits = {
        limit: None if given[option] == NO_LIMIT else given[option]
        for option, (limit, _) in _LIMITS.items()
        if given[option] is not None
    }
    changes: dict[str, Any] = {
        name: frozenset(given[name]) for name in ("scopes", "models") if given[name]
    }
    texts = ("name", "priority", "tenant")
    changes |= {name: given[name] for name in texts if given.get(name) is not None}
    if given["all_models"]:
        changes["models"] = frozenset()
    return replace(terms, limits=replace(terms.limits, **limits), **changes)
