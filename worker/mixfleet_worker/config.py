"""What one worker process runs with, checked once at its start."""

import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mixfleet_broker.errors import ConfigError
from mixfleet_broker.settings import Settings
from mixfleet_broker.terms import QueueRules
from mixfleet_engine.config import Backend, EngineConfig, KvDtype, ModelConfig, WeightDtype
from mixfleet_engine.sharding import check_sharing

BYTES_PER_GIB = 1 << 30
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SIMULATED_MODEL = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Who this worker is and how it behaves; the engine's own settings are apart."""

    worker_id: str
    model: str
    """Name of the model, which is the name of its queue."""
    model_path: Path | None
    """None for a simulated engine."""
    chat_format: str | None
    """None: the checkpoint's own."""
    simulated_step_s: float
    """How long a step of the simulated engine takes."""
    stall_s: float
    drain_s: float
    rules: QueueRules
    key_prefix: str


def worker_config(
    settings: Settings, *, simulated: bool = False, simulated_step_s: float = 0.0, tp: int = 1
) -> WorkerConfig:
    """Return the worker's part of the settings.

    Args:
        settings: In force.
        simulated: Whether to run the simulated engine instead of a model.
        simulated_step_s: How long a step of it takes.
        tp: How many ranks share the model.

    Raises:
        ConfigError: Something is missing or cannot be used here.
        EngineError: The model cannot be read, or not be shared by so many.
    """
    _check_model_path(settings.model_path, simulated=simulated)
    _check_tp(tp, settings, simulated=simulated)
    return WorkerConfig(
        worker_id=settings.worker_id or new_worker_id(),
        model=settings.model or _model_name(settings.model_path),
        model_path=settings.model_path,
        chat_format=settings.chat_format,
        simulated_step_s=simulated_step_s,
        stall_s=settings.stall_s,
        drain_s=settings.drain_s,
        rules=QueueRules.from_settings(settings),
        key_prefix=settings.key_prefix,
    )


def engine_config(settings: Settings) -> EngineConfig:
    """Return the engine's part of the settings."""
    gib = settings.kv_cache_gib
    return EngineConfig(
        kv_cache_bytes=None if gib is None else int(gib * BYTES_PER_GIB),
        max_batch_size=settings.max_batch_size,
        max_step_tokens=settings.max_step_tokens,
        context_length=settings.context_length,
        dtype=settings.dtype,
        weight_dtype=cast("WeightDtype", settings.weight_dtype),
        kv_dtype=cast("KvDtype", settings.kv_dtype),
        prefix_cache=settings.prefix_cache,
        itl_target_s=settings.itl_target_s,
        device=settings.device,
        backend=cast("Backend", settings.backend),  # the table of settings allows no other
        batch_invariant=settings.batch_invariant,
        cuda_graphs=settings.cuda_graphs,
        tuning_s=settings.tuning_s,
        threads=settings.threads,
    )


def new_worker_id() -> str:
    """Return a name that no other worker has: host, process and a random part."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname().partition(".")[0])[:32].strip("-")
    return f"{host or 'worker'}-{os.getpid()}-{secrets.token_hex(3)}"


def _check_model_path(model_path: Path | None, *, simulated: bool) -> None:
    if simulated:
        if model_path is not None:
            raise ConfigError(f"model_path={model_path}: a simulated engine has no model")
        return
    if model_path is None:
        raise ConfigError(
            "model_path is not set: give --model-path DIR, or run `mixfleet up` for the demo model"
        )
    if not model_path.is_dir():
        raise ConfigError(f"model_path={model_path}: no such directory")


def _check_tp(tp: int, settings: Settings, *, simulated: bool) -> None:
    if tp == 1:
        return
    if simulated or settings.model_path is None:
        raise ConfigError(f"tp={tp}: a simulated engine is one process")
    model = ModelConfig.from_checkpoint(settings.model_path)
    check_sharing(model, tp, weight_dtype=settings.weight_dtype)


def _model_name(model_path: Path | None) -> str:
    if model_path is None:
        return SIMULATED_MODEL
    name = model_path.resolve().name
    if not MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"model_path={model_path}: its name cannot be a model's name (letters, digits, dots, "
            "dashes and underscores, at most 64); give --model NAME"
        )
    return name
