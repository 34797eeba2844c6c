"""``mixfleet worker``: serve one model from the queue."""

import logging
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec

import click

from mixfleet_broker.connection import find_redis_url
from mixfleet_broker.errors import ConfigError, MissingExtraError, MixfleetError
from mixfleet_broker.json_log import JsonFormatter
from mixfleet_broker.options import setting_options
from mixfleet_broker.settings import CONFIG_FLAG, SETTINGS, Settings
from mixfleet_broker.workers_cli import COMMANDS
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.errors import EngineError
from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_worker.config import WorkerConfig, engine_config, worker_config
from mixfleet_worker.group import LOST_STATUS, GroupLostError, rank_command, run_ranks

ENGINE_MODULES = ("torch", "safetensors", "tokenizers", "sentencepiece")
"""What the extra ``worker`` brings and a model needs."""

SIMULATED_STEP_S = 0.02
"""Default length of a step of the simulated engine."""
MODEL_SETTINGS = (
    "chat_format",
    "max_batch_size",
    "max_step_tokens",
    "context_length",
    "kv_cache_gib",
    "prefix_cache",
    "itl_target_s",
    "dtype",
    "weight_dtype",
    "kv_dtype",
    "device",
    "backend",
    "batch_invariant",
    "cuda_graphs",
    "tuning_s",
    "threads",
    "lease_s",
    "stall_s",
    "drain_s",
    "max_losses",
    "result_ttl_s",
    "ageing_s",
    "key_prefix",
    "log_level",
    "log_json",
)
"""Settings of a worker that several workers may share."""

logger = logging.getLogger(__name__)


@click.group(invoke_without_command=True, subcommand_metavar="[ls|pause|resume|drain]")
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that share the model, one per device.",
)
@click.option("--simulated", is_flag=True, help="Answer with random words: no model, no torch.")
@click.option(
    "--simulated-step-s",
    type=click.FloatRange(min=0.0),
    default=SIMULATED_STEP_S,
    show_default=True,
    help="Seconds that a step of the simulated engine takes.",
)
@click.option("--parent-pid", type=int, hidden=True, help="End when this is not the parent.")
@setting_options("model_path", "model", "redis", "data_dir", "worker_id", *MODEL_SETTINGS)
@click.pass_context
def worker(
    ctx: click.Context,
    tp: int,
    simulated: bool,
    simulated_step_s: float,
    parent_pid: int | None,
    settings: Settings,
) -> None:
    """Serve a model: take chat jobs from its queue and stream the answers.

    With ls, pause, resume or drain: look at workers, or tell them what to do, from anywhere.

    SIGTERM or Ctrl-C lets it finish its jobs; what is not done in time goes to another worker.

    Under torchrun, each process is one of those that share the model.
    """
    if ctx.invoked_subcommand is not None:
        return
    try:
        rendezvous = Rendezvous.from_environment()
        _configure_rank_logging(settings, rendezvous)
        config = worker_config(
            settings,
            simulated=simulated,
            simulated_step_s=simulated_step_s,
            tp=_num_ranks(tp, rendezvous),
        )
        engine = engine_config(settings)
        if not simulated:
            check_installed(ENGINE_MODULES, what="a worker", extra="worker")
        redis_url = find_redis_url(settings)
    except (MixfleetError, EngineError) as error:
        raise click.ClickException(str(error)) from error
    if rendezvous is None and tp > 1:
        flags = given_flags(ctx) | {"worker_id": config.worker_id}
        ctx.exit(run_ranks(rank_command(flags), tp, report=_report, abandoned=_orphan(parent_pid)))
    _serve(config, engine, redis_url, rendezvous, parent_pid)


for _command in COMMANDS:
    worker.add_command(_command)


def _serve(
    config: WorkerConfig,
    engine: EngineConfig,
    redis_url: str,
    rendezvous: Rendezvous | None,
    parent_pid: int | None,
) -> None:
    # Imported here: the help must not wait for the engine's modules.
    from mixfleet_worker.loop import EngineBrokenError
    from mixfleet_worker.serve import serve, serve_as_rank

    try:
        if rendezvous is None:
            serve(config, engine, redis_url, parent_pid=parent_pid)
        else:
            serve_as_rank(config, engine, redis_url, rendezvous, parent_pid=parent_pid)
    except GroupLostError as error:
        # Who started the ranks says which of them has died; this one only follows it.
        logger.info("rank ends worker_id=%s: %s", config.worker_id, error)
        click.get_current_context().exit(LOST_STATUS)
    except (MixfleetError, EngineError, EngineBrokenError) as error:
        logger.error("worker failed worker_id=%s: %s", config.worker_id, error)
        raise click.ClickException(str(error)) from error


def _num_ranks(tp: int, rendezvous: Rendezvous | None) -> int:
    """Return how many ranks share the model.

    Raises:
        ConfigError: Torchrun started another number than the flag says.
    """
    if rendezvous is None:
        return tp
    world = rendezvous.shard.world
    if tp not in (1, world):
        raise ConfigError(f"tp={tp}: torchrun started {world} processes; leave --tp out")
    return world


def _report(line: str) -> None:
    click.echo(f"Error: {line}", err=True)


def _orphan(parent_pid: int | None) -> Callable[[], bool]:
    return lambda: parent_pid is not None and os.getppid() != parent_pid


def given_flags(ctx: click.Context) -> dict[str, str]:
    """Return the settings that were given on the command line, by name."""
    return {
        name: str(value)
        for name, value in ctx.params.items()
        if value is not None and (name in SETTINGS or name == CONFIG_FLAG)
    }


def _configure_rank_logging(settings: Settings, rendezvous: Rendezvous | None) -> None:
    """Log as the settings say, but of the ranks behind the first one only what is wrong."""
    level = settings.log_level
    if rendezvous is not None and rendezvous.shard.rank > 0 and level in ("debug", "info"):
        level = "warning"
    configure_logging(level, as_json=settings.log_json)


def configure_logging(level: str, *, as_json: bool = False) -> None:
    """Log to standard error, one event a line."""
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def check_installed(modules: tuple[str, ...], *, what: str, extra: str) -> None:
    """Look for modules without importing them.

    Raises:
        MissingExtraError: One is not installed.
    """
    if any(find_spec(module) is None for module in modules):
        raise MissingExtraError(what=what, extra=extra)
