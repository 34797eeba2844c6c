"""``mixfleet worker``: serve one model from the queue."""

import logging
import sys
from importlib.util import find_spec

import click

from mixfleet_broker.connection import find_redis_url
from mixfleet_broker.errors import MissingExtraError, MixfleetError
from mixfleet_broker.options import setting_options
from mixfleet_broker.settings import Settings
from mixfleet_engine.errors import EngineError
from mixfleet_worker.config import engine_config, worker_config

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
    "dtype",
    "device",
    "backend",
    "threads",
    "lease_s",
    "stall_s",
    "drain_s",
    "max_losses",
    "result_ttl_s",
    "log_level",
)
"""Settings of a worker that several workers may share."""

logger = logging.getLogger(__name__)


@click.command()
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Devices that share the model; only 1 so far.",
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
def worker(
    tp: int, simulated: bool, simulated_step_s: float, parent_pid: int | None, settings: Settings
) -> None:
    """Serve a model: take chat jobs from its queue and stream the answers.

    SIGTERM or Ctrl-C lets it finish its jobs; what is not done in time goes to another worker.
    """
    configure_logging(settings.log_level)
    try:
        config = worker_config(
            settings, simulated=simulated, simulated_step_s=simulated_step_s, tp=tp
        )
        engine = engine_config(settings)
        if not simulated:
            check_installed(ENGINE_MODULES, what="a worker", extra="worker")
        redis_url = find_redis_url(settings)
        # Imported here: the help must not wait for the engine's modules.
        from mixfleet_worker.loop import EngineBrokenError
        from mixfleet_worker.serve import serve
    except (MixfleetError, EngineError) as error:
        raise click.ClickException(str(error)) from error
    try:
        serve(config, engine, redis_url, parent_pid=parent_pid)
    except (MixfleetError, EngineError, EngineBrokenError) as error:
        logger.error("worker failed worker_id=%s: %s", config.worker_id, error)
        raise click.ClickException(str(error)) from error


def configure_logging(level: str) -> None:
    """Log to standard error, one event a line."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )


def check_installed(modules: tuple[str, ...], *, what: str, extra: str) -> None:
    """Look for modules without importing them.

    Raises:
        MissingExtraError: One is not installed.
    """
    if any(find_spec(module) is None for module in modules):
        raise MissingExtraError(what=what, extra=extra)
