"""From a checkpoint folder and settings to an engine that is ready to run."""

import logging
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from mixfleet_engine.backend_choice import choose_backend
from mixfleet_engine.capture import CudaGraphRecorder, NoRecorder
from mixfleet_engine.config import EngineConfig, ModelConfig
from mixfleet_engine.decode_step import buckets
from mixfleet_engine.device_runner import DeviceRunner
from mixfleet_engine.devices import machine_of, measured_free_bytes
from mixfleet_engine.engine import Engine
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.fit import require_fit
from mixfleet_engine.grammar import Grammars
from mixfleet_engine.kv_cache import FP8, KvCache
from mixfleet_engine.model import MixtralModel
from mixfleet_engine.ops.cpu import bfloat16_is_fast
from mixfleet_engine.plan import EngineSizes, MemoryPlan, engine_sizes, packed_dtype
from mixfleet_engine.rank_runner import LeadingRunner
from mixfleet_engine.ranks import OneRank, Ranks
from mixfleet_engine.runner import ModelRunner
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.sharding import check_sharing, share_of
from mixfleet_engine.tokenizer import Tokenizer
from mixfleet_engine.weight_loader import Progress, WeightLoader
from mixfleet_engine.weights import Checkpoint, open_checkpoint

logger = logging.getLogger(__name__)


def load_engine(
    path: Path,
    config: EngineConfig,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    tokenizer: Tokenizer | None = None,
) -> Engine:
    """Load the checkpoint folder ``path`` and return an engine that runs it.

    Args:
        path: Mistral's or the Hugging Face layout.
        config: How to run it.
        progress: Called after each tensor with bytes done and bytes in all.
        ranks: Who else holds a part of the model; None: nobody. This is the first of them, and
            each other one calls `load_runner` and then `follow`.
        tokenizer: The model's, for requests with a grammar; None: these are refused.

    Raises:
        CheckpointError: A file is missing, broken or of the wrong shape.
        ConfigError: A setting does not fit the model or the machine.
    """
    model = ModelConfig.from_checkpoint(path)
    ranks = ranks or OneRank()
    if config.pipelined and ranks.shard.world > 1:
        raise ConfigError(
            f"pipelined=True: not with {ranks.shard.world} ranks, of which only the first samples"
        )
    sizes = planned_sizes(model, config, ranks.shard.world)
    runner = load_runner(path, config, progress, ranks)
    return make_engine(runner, model, config, sizes.max_batch_size, tokenizer, ranks)


def make_engine(
    runner: ModelRunner,
    model: ModelConfig,
    config: EngineConfig,
    max_batch_size: int,
    tokenizer: Tokenizer | None = None,
    ranks: Ranks | None = None,
) -> Engine:
    """Return an engine with nothing in its KV cache; the runner's last one is of no use any more.

    Args:
        runner: Of `load_runner` or `make_runner`, on the first rank.
        model: What it runs.
        config: As it was loaded, but for what only the scheduler reads.
        max_batch_size: Most sequences that run at once.
        tokenizer: As for `load_engine`.
        ranks: As for `load_engine`.
    """
    is_alone = ranks is None or ranks.shard.world == 1
    scheduler = Scheduler(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_batch_size=max_batch_size,
        max_step_tokens=config.max_step_tokens,
        context_length=config.context_of(model),
        vocab_size=model.vocab_size,
        prefix_cache=config.prefix_cache,
        itl_target_s=config.itl_target_s,
        grammars=None if tokenizer is None else Grammars(tokenizer, model.vocab_size),
    )
    pipelined = is_alone and not runner.waits if config.pipelined is None else config.pipelined
    if ranks is None or is_alone:
        return Engine(runner, scheduler, pipelined=pipelined)
    return Engine(LeadingRunner(runner, ranks), scheduler, pipelined=pipelined)


def planned_sizes(model: ModelConfig, config: EngineConfig, world: int = 1) -> EngineSizes:
    """Return the batch and the KV cache that fit beside the weights; nothing is loaded yet.

    Raises:
        DoesNotFitError: The model is too big for the memory; the text names what fits.
        ConfigError: A setting asks for more than there is, or the weights cannot be run as it says.
    """
    return engine_sizes(_plan(model, config, world), config, model)


def _plan(model: ModelConfig, config: EngineConfig, world: int) -> MemoryPlan:
    device = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    weight_dtype: str = config.weight_dtype
    if weight_dtype == "auto":
        weight_dtype = packed_dtype(model) or dtype
        if model.packed is not None:
            model.packed.check_runs_as_it_is()
    return require_fit(
        model,
        machine_of(device, world),
        weight_dtype=weight_dtype,
        kv_dtype=dtype if config.kv_dtype == "auto" else config.kv_dtype,
    )


def load_runner(
    path: Path,
    config: EngineConfig,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> ModelRunner:
    """Load the rank's part of the model and return what runs its steps; see `load_engine`.

    On a GPU the KV cache gets what is free when the weights are there. What was planned before
    from sizes alone only says whether it is worth to load them.
    """
    model = ModelConfig.from_checkpoint(path)
    return make_runner(
        lambda: open_checkpoint(path, model), model, config, progress, ranks or OneRank(), str(path)
    )


def make_runner(
    opened: Callable[[], Checkpoint],
    model: ModelConfig,
    config: EngineConfig,
    progress: Progress | None,
    ranks: Ranks,
    name: str,
) -> ModelRunner:
    """Return what runs the steps of a model whose weights may come from anywhere.

    Args:
        opened: Opens the weights; called when it is known that they fit.
        model: Their sizes.
        config: How to run it.
        progress: As for `load_engine`.
        ranks: As for `load_engine`.
        name: What the log calls it.
    """
    check_sharing(model, ranks.shard.world, weight_dtype=config.weight_dtype)
    plan = _plan(model, config, ranks.shard.world)
    # Before any rank loads: on a CPU each would find less memory than the one before.
    sizes = engine_sizes(plan, config, model)
    num_blocks = ranks.lowest(sizes.num_blocks)
    device = resolve_device(config.device)
    if config.symmetric_memory:
        # Before the weights, so that the KV cache takes only what it leaves.
        num_rows = ranks.lowest(buckets(sizes.max_batch_size)[-1])
        ranks.share_memory(num_rows, model.dim, resolve_dtype(config.dtype, device))
    loaded, backend_name = _load_model(opened, model, config, progress, ranks)
    free_bytes = measured_free_bytes(device)
    if free_bytes is not None:
        found = engine_sizes(plan.after_loading(free_bytes), config, model).num_blocks
        num_blocks = ranks.lowest(found, is_loaded=True)
    cache = _kv_cache(model, config, ranks, num_blocks)
    logger.info(
        "loaded %s: backend=%s dtype=%s weight_dtype=%s device=%s num_blocks=%d block_size=%d",
        *(name, backend_name, resolve_dtype(config.dtype, device), config.weight_dtype, device),
        *(num_blocks, config.block_size),
    )
    _warn_of_short_cache(num_blocks * config.block_size, config.context_of(model))
    max_rows = sizes.max_batch_size
    if backend_name == "cuda":
        # Ranks record steps of the same shapes.
        max_rows = ranks.lowest(max_rows, is_loaded=True)
    ranks.wait_for_loaded()
    if backend_name != "cuda":
        return ModelRunner(loaded, cache, device)
    records = device.type == "cuda" and config.cuda_graphs
    return DeviceRunner(
        loaded,
        cache,
        device,
        CudaGraphRecorder() if records else NoRecorder(),
        max_rows=max_rows,
        context_length=config.context_of(model),
    )


def _load_model(
    opened: Callable[[], Checkpoint],
    model: ModelConfig,
    config: EngineConfig,
    progress: Progress | None,
    ranks: Ranks,
) -> tuple[MixtralModel, str]:
    """Return the rank's part of the model and the name of its back-end."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    threads = config.threads or _spare_threads(ranks.shard.world)
    torch.set_num_threads(threads)
    backend = choose_backend(config, model, dtype=dtype, device=device, threads=threads)
    loader = WeightLoader(
        opened(),
        model,
        dtype=dtype,
        device=device,
        weight_dtype=config.weight_dtype,
        progress=ranks.watched(progress),
        shard=ranks.shard,
    )
    with closing(loader):
        loaded = MixtralModel.load(loader, model, backend, config.context_of(model), ranks)
    return loaded, backend.name


def _kv_cache(model: ModelConfig, config: EngineConfig, ranks: Ranks, num_blocks: int) -> KvCache:
    device = resolve_device(config.device)
    return KvCache(
        share_of(model, ranks.shard),
        num_blocks=num_blocks,
        block_size=config.block_size,
        dtype=FP8 if config.kv_dtype == "fp8" else resolve_dtype(config.dtype, device),
        device=device,
    )


def _warn_of_short_cache(num_tokens: int, context_length: int) -> None:
    if num_tokens < context_length:
        logger.warning(
            "the KV cache holds %d tokens, so no request can use the context of %d; give it more",
            *(num_tokens, context_length),
        )


def _spare_threads(world: int) -> int:
    """Return torch's own number, but one core less than there are.

    The client, Redis and the worker's own I/O run beside the engine. With a thread on every core
    they make its threads wait for each other at each product, which costs more than the core.
    Several ranks share the cores out, whatever torch says: torchrun tells each of them one thread.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if world > 1:
        return max(1, (num_cores or 1) // world)
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
