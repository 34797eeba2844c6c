"""``mixfleet doctor``: is this installation well, and does a model fit a machine."""

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Final, Literal

import click
from rich.console import Console
from rich.table import Table

from mixfleet_broker.connection import connect
from mixfleet_broker.embedded import running_url
from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.options import setting_options
from mixfleet_broker.redis_url import safe_redis_url
from mixfleet_broker.server_check import Finding, Level, check_server
from mixfleet_broker.settings import Settings
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.errors import ConfigError, EngineError
from mixfleet_engine.published import PUBLISHED, published_name
from mixfleet_engine.weight_formats import WEIGHT_DTYPES
from mixfleet_worker.fit_report import Here, as_json, fit_report, print_report

REDIS_PATIENCE_S: Final = 1.0
_COMPILERS: Final = ("cc", "gcc", "clang")
_GIB: Final = 1 << 30

CheckState = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at."""

    name: str
    state: CheckState
    """A note is worth knowing; a problem keeps something that is set from working."""
    text: str


@click.command()
@click.option("--fit", metavar="MODEL", help="Say on which machines MODEL fits.")
@click.option("--weight-dtype", type=click.Choice(WEIGHT_DTYPES), help="With --fit: this one only.")
@click.option("--context", type=click.IntRange(min=1), help="With --fit: this context only.")
@click.option("--json", "as_json_text", is_flag=True, help="Print JSON, sizes in bytes.")
@setting_options("redis", "data_dir")
def doctor(
    fit: str | None,
    weight_dtype: str | None,
    context: int | None,
    as_json_text: bool,
    settings: Settings,
) -> None:
    """Check this installation, or with --fit where a model fits.

    MODEL is a checkpoint's directory (its params.json or config.json is enough), a model of the
    data directory, or a published one: mixtral-8x7b, mixtral-8x22b. Nothing is loaded.
    """
    if fit is None:
        if weight_dtype is not None or context is not None:
            raise click.UsageError("--weight-dtype and --context need --fit MODEL")
        _show_checks(checks(settings), as_json_text=as_json_text)
        return
    try:
        name, model = find_model(fit, settings.data_dir)
        report = fit_report(name, model, _here(), weight_dtype=weight_dtype, context=context)
    except EngineError as error:
        raise click.ClickException(str(error)) from error
    if as_json_text:
        click.echo(json.dumps(as_json(report), indent=2))
    else:
        print_report(report, Console(markup=False))


def find_model(name: str, data_dir: Path) -> tuple[str, ModelConfig]:
    """Return the full name and the sizes of what ``--fit`` names.

    Raises:
        ConfigError: Nothing has this name.
        EngineError: Its files cannot be used.
    """
    folder = Path(name) if Path(name).is_dir() else _own_model(name, data_dir)
    if folder is not None:
        return folder.resolve().name, ModelConfig.from_checkpoint(folder)
    full = published_name(name)
    if full is None:
        raise ConfigError(
            f"{name}: no directory, no model of {data_dir}, and none of {', '.join(PUBLISHED)}"
        )
    return full, PUBLISHED[full]


def _own_model(name: str, data_dir: Path) -> Path | None:
    if find_spec("numpy") is None:  # then nothing here could have made or read a model
        return None
    from mixfleet_engine.demo_model import DEMO_MODEL, models_dir

    folder = models_dir(data_dir) / (DEMO_MODEL if name == "demo" else name)
    return folder if folder.is_dir() else None


def _here() -> Here | None:
    """Return this machine; None without torch, which alone knows the devices."""
    if find_spec("torch") is None:
        return None
    from mixfleet_engine.devices import found_machine, torch_facts

    machine = found_machine()
    fast = machine.kind == "cuda" or torch_facts().bfloat16
    return Here(machine=machine, dtype="bfloat16" if fast else "float32")


def checks(settings: Settings) -> list[Check]:
    """Return what is found, in the order in which things depend on each other."""
    return [
        Check(name="mixfleet", state="ok", text=version("mixfleet")),
        Check(name="python", state="ok", text=platform.python_version()),
        *_torch_checks(),
        _compiler_check(),
        *_redis_checks(settings),
    ]


def _torch_checks() -> list[Check]:
    if find_spec("torch") is None:
        text = "not installed, so no model runs here: pip install 'mixfleet[worker]'"
        return [Check(name="torch", state="note", text=text)]
    from mixfleet_engine.devices import found_machine, torch_facts

    facts, machine = torch_facts(), found_machine()
    built_for = f"for CUDA {facts.cuda}" if facts.cuda else "for CPUs"
    threads = f"{facts.threads} threads on {facts.num_cores} cores"
    memory = f"{machine.available_bytes / _GIB:.1f} of {machine.memory_bytes / _GIB:.1f} GiB"
    each = " each" if machine.num_devices > 1 else ""
    bfloat16 = "multiplied by the device itself"
    if not facts.bfloat16:
        bfloat16 = "not multiplied by the device itself, so float32 is the default"
    return [
        Check(name="torch", state="ok", text=f"{facts.version} {built_for}, {threads}"),
        Check(name="device", state="ok", text=f"{machine.label}, {memory} available{each}"),
        Check(name="bfloat16", state="ok" if facts.bfloat16 else "note", text=bfloat16),
    ]


def _compiler_check() -> Check:
    for name in _COMPILERS:
        path = which(name)
        if path is not None:
            return Check(name="compiler", state="ok", text=path)
    text = f"none of {', '.join(_COMPILERS)}, so the engine runs without its native kernels"
    return Check(name="compiler", state="note", text=text)


def _redis_checks(settings: Settings) -> list[Check]:
    url = settings.redis or running_url(settings.data_dir)
    if url is None:
        text = "none is set and none runs: `mixfleet up` starts one"
        return [Check(name="redis", state="note", text=text)]
    try:
        with connect(url, patience_s=REDIS_PATIENCE_S) as redis:
            found = check_server(redis)
    except MixfleetError as error:
        return [Check(name="redis", state="problem", text=str(error))]
    answers = Check(name="redis", state="ok", text=f"answers at {safe_redis_url(url)}")
    return [answers, *map(_redis_finding, found)]


def _redis_finding(finding: Finding) -> Check:
    states: dict[Level, CheckState] = {"ok": "ok", "warning": "note", "refuse": "problem"}
    return Check(name=f"redis-{finding.topic}", state=states[finding.level], text=finding.text)


def _show_checks(found: list[Check], *, as_json_text: bool) -> None:
    """Print the checks; exit status 1 if one is a problem."""
    if as_json_text:
        click.echo(json.dumps([asdict(check) for check in found], indent=2))
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for check in found:
            table.add_row(check.state, check.name, check.text)
        # A text may hold brackets that are no markup: mixfleet[worker].
        Console(markup=False).print(table)
    if any(check.state == "problem" for check in found):
        click.get_current_context().exit(1)
