"""The command `mixfleet rq`: rq's own tools on the fleet's Redis, in a hardened process.

Nothing of rq is imported here; see :mod:`mixfleet_broker.rq_tools`.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Final

import click

from mixfleet_broker.connection import find_redis_url, plain_redis_url
from mixfleet_broker.errors import ConfigError, MissingExtraError
from mixfleet_broker.options import setting_options
from mixfleet_broker.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One tool of rq's."""

    name: str
    help: str
    url_variable: str = "RQ_REDIS_URL"
    """Where it looks for the server's URL: an argument could be read in the list of processes."""
    modules: tuple[str, ...] = ()
    """What it needs beyond rq."""
    extra: str | None = None
    """The extra that brings these; None where none can."""


TOOLS: Final = (
    Tool(name="info", help="Show queues and workers in the terminal."),
    Tool(name="requeue", help="Put failed jobs back into their queue."),
    Tool(name="empty", help="Delete the jobs that wait in a queue."),
    Tool(name="suspend", help="Let no worker start a job."),
    Tool(name="resume", help="Let workers start jobs again."),
    Tool(
        name="dashboard",
        help="Serve rq-dashboard, on this machine alone unless it has a password.",
        url_variable="RQ_DASHBOARD_REDIS_URL",
        modules=("rq_dashboard", "six"),
        extra="rq-tools",
    ),
    Tool(
        name="exporter",
        help="Serve rq-exporter's metrics to Prometheus.",
        modules=("rq_exporter", "prometheus_client"),
    ),
)
"""Those that look at jobs or order them about, and none that runs them."""


@click.group()
def rq() -> None:
    """Run rq's own tools on the queue, in a process that runs nothing of what it finds there.

    What stands behind -- goes to the tool as it is: `mixfleet rq dashboard -- --help`.
    """


def _command(tool: Tool) -> click.Command:
    @click.command(tool.name, help=tool.help, context_settings={"ignore_unknown_options": True})
    @setting_options("redis", "data_dir", "key_prefix")
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(settings: Settings, arguments: Sequence[str]) -> None:
        _start(tool, settings, arguments)

    return command


def _start(tool: Tool, settings: Settings, arguments: Sequence[str]) -> None:
    """Become the tool."""
    if not all(find_spec(module) for module in tool.modules):
        raise _not_installed(tool)
    if settings.key_prefix and not _knows_prefixes(version("rq")):
        raise ConfigError(
            f"key_prefix={settings.key_prefix}: rq {version('rq')} sees only keys that begin with "
            "rq: install rq 3"
        )
    # Asked first, so that a server that is away is one line, in our words.
    url = plain_redis_url(find_redis_url(settings))
    # click splits a variable with many values at white space.
    os.environ[tool.url_variable] = "%20".join(url.split())
    os.environ["RQ_KEY_PREFIX"] = f"{settings.key_prefix}rq"
    # -P: a file in the working directory must not be taken for a module.
    program = [sys.executable, "-P", "-m", "mixfleet_broker.rq_tools"]
    os.execv(sys.executable, [*program, tool.name, *arguments])


def _knows_prefixes(rq_version: str) -> bool:
    return int(rq_version.partition(".")[0]) >= 3


def _not_installed(tool: Tool) -> Exception:
    what = f"`mixfleet rq {tool.name}`"
    if tool.extra:
        return MissingExtraError(what=what, extra=tool.extra)
    return click.ClickException(
        f"{what} needs rq-exporter, which needs rq 2: in a venv of its own, "
        "pip install mixfleet rq-exporter"
    )


for _tool in TOOLS:
    rq.add_command(_command(_tool))
