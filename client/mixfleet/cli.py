"""The one command, ``mixfleet``: a group that imports a command's module when it is called.

So the help and a chat start fast and never import torch, and a part that is not installed
hurts only its own command.
"""

import errno
import importlib
from typing import Any

import click

from mixfleet_broker.errors import MixfleetError

INTERRUPTED = 130
"""What a shell says of a program ended by Ctrl-C: 128 + SIGINT."""


class LazyCommand(click.Command):
    """A name and a help text in front of a command that lives elsewhere.

    Args:
        name: What the user types.
        target: ``module:attribute`` of the command.
        help_text: One line, shown without importing the target.
        extra: The optional part of mixfleet that brings what the target imports.
    """

    def __init__(self, name: str, target: str, help_text: str, extra: str | None = None) -> None:
        super().__init__(name, help=help_text, short_help=help_text)
        self.target = target
        self.extra = extra

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Return the context of the real command, which is imported now."""
        return self.load().make_context(info_name, args, parent, **extra)

    def load(self) -> click.Command:
        """Import and return the real command.

        Raises:
            click.ClickException: A module it needs is not installed.
        """
        module_name, attribute = self.target.split(":")
        try:
            command = getattr(importlib.import_module(module_name), attribute)
        except ModuleNotFoundError as error:
            package = f"mixfleet[{self.extra}]" if self.extra else "mixfleet"
            raise click.ClickException(
                f"'mixfleet {self.name}' needs the module {error.name!r}, which is not "
                f"installed: pip install '{package}'"
            ) from error
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.target} is not a click command")
        return command


class ErrorLineGroup(click.Group):
    """A group whose expected failures are one line on stderr, not a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the commands in the order of the table, which is the order of a first day."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command; exit code 1 on a failure of ours, 130 on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except MixfleetError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # `| head` has seen enough; click ends quietly
                raise
            raise click.ClickException(str(error)) from error
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(INTERRUPTED)


COMMANDS = (
    LazyCommand("up", "mixfleet_worker.up:up", "Start all that a chat needs, here.", "worker"),
    LazyCommand("chat", "mixfleet.chat:chat", "Chat in the terminal, or ask one question."),
    LazyCommand("worker", "mixfleet_worker.cli:worker", "Serve a model from the queue.", "worker"),
    LazyCommand(
        "gateway", "mixfleet_broker.gateway.cli:gateway", "Serve clients over HTTP.", "gateway"
    ),
    LazyCommand("queue", "mixfleet_broker.cli:queue", "Show depth, workers and jobs."),
    LazyCommand("job", "mixfleet_broker.jobs_cli:job", "List, show, cancel and requeue jobs."),
    LazyCommand("key", "mixfleet_broker.keys_cli:key", "Make and revoke API keys."),
    LazyCommand("rq", "mixfleet_broker.rq_cli:rq", "Run rq's own tools, made safe."),
    LazyCommand("model", "mixfleet_worker.model_cli:model", "Fetch and import models.", "worker"),
    LazyCommand("doctor", "mixfleet_worker.doctor:doctor", "Check this machine, and what fits it."),
)


@click.group(
    cls=ErrorLineGroup,
    commands={str(command.name): command for command in COMMANDS},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="mixfleet", message="%(prog)s %(version)s")
def main() -> None:
    """Chat with Mixtral models, served by a fleet of workers behind a Redis queue."""
