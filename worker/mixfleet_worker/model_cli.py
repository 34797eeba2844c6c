"""``mixfleet model``: import, download and list models."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mixfleet_broker.options import setting_options
from mixfleet_broker.settings import Settings
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.demo_model import DEMO_MODEL, ensure_demo_model, models_dir
from mixfleet_engine.errors import EngineError
from mixfleet_engine.gguf_import import import_gguf

_MIN_EXPERTS, _MAX_EXPERTS = 2, 1024
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """One model in the data directory, as ``mixfleet model ls`` shows it."""

    name: str
    path: str
    size_bytes: int
    """On the disk."""
    num_layers: int | None = None
    num_experts: int | None = None
    context_length: int | None = None
    problem: str | None = None
    """Why it cannot be used; the sizes are then unknown."""


@click.group()
def model() -> None:
    """Get models and see which there are."""


@model.command("import")
@click.argument("gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), help="Directory to make.")
@click.option(
    "--num-experts",
    type=click.IntRange(_MIN_EXPERTS, _MAX_EXPERTS),
    default=8,
    show_default=True,
    help="Experts to make of a dense model; a Mixtral file has its own.",
)
@setting_options("data_dir")
def import_command(gguf: Path, to: Path | None, num_experts: int, settings: Settings) -> None:
    """Turn the file GGUF (Llama, Mistral or Mixtral) into a model for mixfleet.

    Without --to it goes into the data directory, under the file's name.
    """
    target = to or models_dir(settings.data_dir) / _model_name(gguf)
    with _clear_errors(), _progress_bar(f"importing {gguf.name}") as progress:
        import_gguf(gguf, target.absolute(), num_experts=num_experts, progress=progress)
    click.echo(f"imported to {target}")


@model.command()
@click.argument("name", type=click.Choice(["demo", DEMO_MODEL]))
@setting_options("data_dir")
def pull(name: str, settings: Settings) -> None:  # noqa: ARG001 - there is one model so far
    """Download the demo model: a real chat model of 135 M parameters, Apache-2.0."""
    with _clear_errors(), _progress_bar("converting") as progress:
        path = ensure_demo_model(
            settings.data_dir, lambda line: click.echo(line, err=True), progress=progress
        )
    click.echo(path)


@model.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@setting_options("data_dir")
def ls(as_json: bool, settings: Settings) -> None:
    """List the models in the data directory."""
    records = list(find_models(settings.data_dir))
    if as_json:
        click.echo(json.dumps([asdict(record) for record in records], indent=2))
        return
    if not records:
        directory = models_dir(settings.data_dir)
        click.echo(f"no models in {directory}; `mixfleet model pull demo` gets one")
        return
    click.echo(f"{models_dir(settings.data_dir)}:")
    Console().print(_table(records))
    for record in records:
        if record.problem is not None:
            click.echo(f"{record.name}: {record.problem}", err=True)


def find_models(data_dir: Path) -> Iterator[ModelRecord]:
    """Yield every model in the data directory, by name; also those that cannot be used."""
    directory = models_dir(data_dir)
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield _record(path)


def _record(path: Path) -> ModelRecord:
    size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        config = ModelConfig.from_checkpoint(path)
    except EngineError as error:
        return ModelRecord(
            name=path.name, path=str(path), size_bytes=size_bytes, problem=str(error)
        )
    return ModelRecord(
        name=path.name,
        path=str(path),
        size_bytes=size_bytes,
        num_layers=config.n_layers,
        num_experts=config.num_experts,
        context_length=config.context_length,
    )


def _table(records: list[ModelRecord]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("NAME")
    for heading in ("GIB", "LAYERS", "EXPERTS", "CONTEXT"):
        table.add_column(heading, justify="right")
    for record in records:
        sizes = (record.num_layers, record.num_experts, record.context_length)
        table.add_row(
            record.name,
            f"{record.size_bytes / _GIB:.2f}",
            *("-" if size is None else str(size) for size in sizes),
        )
    return table


def _model_name(gguf: Path) -> str:
    """Return a model name made of the file's: lower case, and only what a name may contain."""
    name = re.sub(r"[^a-z0-9._-]+", "-", gguf.stem.lower()).strip("._-")[:64]
    return name or "model"


@contextmanager
def _progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Give a callback that shows a bar on standard error, from its first call on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=None)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:  # else it would end a line that was never begun
            bar.stop()


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Show an error that a user or a file can cause as one line, not as a traceback."""
    try:
        yield
    except (EngineError, OSError) as error:
        raise click.ClickException(str(error)) from error
