"""Settings as click options: one decorator, and the command receives them resolved."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mixfleet_broker.errors import ConfigError
from mixfleet_broker.settings import CONFIG_FLAG, CONFIG_VARIABLE, SETTINGS, Setting, resolve

R = TypeVar("R")


def setting_options(*names: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Add the flags of the settings ``names``, and ``--config``, to a click command.

    The command is called with one more keyword argument, ``settings``: all settings in force,
    those without a flag of this command included. A value that cannot be used ends the command
    with click's usage error (exit status 2) before its body runs.

    Example::

        @click.command()
        @setting_options("redis", "data_dir")
        def queue(settings: Settings) -> None: ...
    """
    options = [_option(SETTINGS[name]) for name in names]
    options.append(
        click.option(
            f"--{CONFIG_FLAG}",
            type=click.Path(path_type=Path),
            metavar="PATH",
            help=f"TOML file of settings.  [env: {CONFIG_VARIABLE}; default: the user's]",
        )
    )

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(command)
        def with_settings(*args: Any, **parameters: Any) -> R:
            flags = {name: parameters.pop(name) for name in names}
            config_file = parameters.pop(CONFIG_FLAG)
            try:
                settings = resolve(flags, config_file=config_file)
            except ConfigError as error:
                raise click.UsageError(str(error), click.get_current_context()) from error
            return command(*args, settings=settings, **parameters)

        # click lists options in the order of decorators, last applied first.
        decorated: Callable[..., R] = with_settings
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


def _option(setting: Setting) -> Callable[[Callable[..., R]], Callable[..., R]]:
    default = setting.default.strip("`")
    # Read as text: the table checks it, in the same words as a variable or a TOML key.
    return click.option(
        setting.flag,
        setting.name,
        metavar=setting.kind.metavar,
        help=f"{setting.help}  [env: {setting.variable}; default: {default}]",
    )
