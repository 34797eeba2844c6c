"""From a checkpoint folder and settings to an engine that is ready to run."""

import logging
import os
from pathlib import Path

import torch

from mixfleet_engine.config import EngineConfig, ModelConfig, Shard
from mixfleet_engine.engine import Engine
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.kv_cache import KvCache, planned_num_blocks
from mixfleet_engine.model import MixtralModel
from mixfleet_engine.ops.cpu import CpuOps, bfloat16_is_fast
from mixfleet_engine.ops.door import Ops
from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.runner import ModelRunner
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.weights import Progress, WeightLoader, open_checkpoint

logger = logging.getLogger(__name__)


def load_engine(path: Path, config: EngineConfig, progress: Progress | None = None) -> Engine:
    """Load the checkpoint folder ``path`` and return an engine that runs it.

    Args:
        path: Mistral's or the Hugging Face layout.
        config: How to run it.
        progress: Called after each tensor with bytes done and bytes in all.

    Raises:
        CheckpointError: A file is missing, broken or of the wrong shape.
        ConfigError: A setting does not fit the model or the machine.
    """
    model = ModelConfig.from_checkpoint(path)
    runner = load_runner(path, config, progress)
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_batch_size=config.max_batch_size,
        max_step_tokens=config.max_step_tokens,
        context_length=config.context_of(model),
        vocab_size=model.vocab_size,
    )
    return Engine(runner, scheduler)


def load_runner(path: Path, config: EngineConfig, progress: Progress | None = None) -> ModelRunner:
    """Load the checkpoint folder ``path`` and return what runs its steps; see `load_engine`."""
    model_config = ModelConfig.from_checkpoint(path)
    context_length = config.context_of(model_config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    ops = make_ops(config.backend, dtype, device)
    torch.set_num_threads(config.threads or _spare_threads())
    checkpoint = open_checkpoint(path, model_config, Shard())
    loader = WeightLoader(checkpoint, model_config, dtype=dtype, device=device, progress=progress)
    model = MixtralModel.load(loader, model_config, ops, context_length)
    num_blocks = planned_num_blocks(model_config, config, dtype, device)
    cache = KvCache(
        model_config,
        num_blocks=num_blocks,
        block_size=config.block_size,
        dtype=dtype,
        device=device,
    )
    logger.info(
        "loaded %s: backend=%s dtype=%s device=%s num_blocks=%d block_size=%d",
        *(path, ops.name, dtype, device, num_blocks, config.block_size),
    )
    if num_blocks * config.block_size < context_length:
        logger.warning(
            "the KV cache holds %d tokens, so no request can use the context of %d; give it more",
            *(num_blocks * config.block_size, context_length),
        )
    return ModelRunner(model, cache, device)


def _spare_threads() -> int:
    """Return torch's own number, but one core less than there are.

    The client, Redis and the worker's own I/O run beside the engine. With a thread on every core
    they make its threads wait for each other at each product, which costs more than the core.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(torch.get_num_threads(), max(1, (num_cores or 1) - 1))


def resolve_device(name: str) -> torch.device:
    """Return the device that the setting ``device`` means on this machine.

    Raises:
        ConfigError: It is not here.
    """
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: {error}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: this machine has {torch.cuda.device_count()} of them")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of weights, activations and KV cache that the setting ``dtype`` means.

    ``auto`` is bf16, but fp32 on a CPU that has no bf16 arithmetic (it would be 3 to 10 times
    slower). The checkpoint's own dtype does not matter: weights are converted as they are read.

    Raises:
        ConfigError: float16 on a CPU, which is hundreds of times slower than bf16.
    """
    if device.type == "cpu" and name == "float16":
        raise ConfigError("dtype='float16': CPUs compute it very slowly, use bfloat16 or float32")
    if name == "auto":
        fast = device.type != "cpu" or bfloat16_is_fast()
        return torch.bfloat16 if fast else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def make_ops(backend: str, dtype: torch.dtype, device: torch.device) -> Ops:
    """Return the back-end that the setting ``backend`` means on ``device``.

    Raises:
        ConfigError: It does not run there.
    """
    if backend == "cpu" and device.type != "cpu":
        raise ConfigError(f"backend='cpu': does not run on device={str(device)!r}")
    if backend == "reference" or device.type != "cpu":
        return ReferenceOps()
    return CpuOps(dtype)
