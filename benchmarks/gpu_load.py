"""Loads a random model of any size and form as the engine loads any, and makes engines of it."""

import time
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from benchmarks.gpu_scale import Scale
from benchmarks.gpu_weights import RandomCheckpoint
from mixfleet_engine.config import EngineConfig, KvDtype, WeightDtype
from mixfleet_engine.engine import Engine
from mixfleet_engine.loading import make_engine, make_runner, resolve_device, resolve_dtype
from mixfleet_engine.ranks import OneRank

NO_ITL_TARGET_S: Final = 60.0


class NotMeasurableError(Exception):
    """Something cannot be measured here; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model with its KV cache, ready to run."""

    runner: Any
    """Whatever `make_runner` gives for this device."""
    scale: Scale
    config: EngineConfig
    device: torch.device
    load_s: float

    @property
    def weight_dtype(self) -> str:
        """Of the large matrices, a word that `stored_bytes` knows."""
        return "bfloat16" if self.config.weight_dtype == "auto" else self.config.weight_dtype

    @property
    def kv_dtype(self) -> str:
        """Of the KV cache, a key of `KV_BYTES`."""
        return "bfloat16" if self.config.kv_dtype == "auto" else self.config.kv_dtype

    def engine(self, itl_target_s: float = NO_ITL_TARGET_S) -> Engine:
        """Return an engine with nothing in its KV cache, as `load_engine` would make it.

        The one before must not be used any more. Without a target, prompts that come together are
        prefilled in the largest steps.
        """
        config = replace(self.config, itl_target_s=itl_target_s)
        return make_engine(self.runner, self.scale.model, config, self.scale.max_batch_size)


def load(
    scale: Scale,
    *,
    weight_dtype: WeightDtype = "auto",
    kv_dtype: KvDtype = "auto",
    batch_invariant: bool = True,
) -> Loaded:
    """Make a random model and load it."""
    device = resolve_device("auto")
    config = EngineConfig(
        max_batch_size=scale.max_batch_size,
        max_step_tokens=scale.max_step_tokens,
        num_blocks=scale.num_blocks,
        dtype="bfloat16",
        device=str(device),
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        backend="auto" if device.type == "cuda" else "cpu",
        batch_invariant=batch_invariant,
    )
    dtype = resolve_dtype(config.dtype, device)
    started = time.perf_counter()
    runner = make_runner(
        lambda: RandomCheckpoint(scale.model, device, dtype),
        scale.model,
        config,
        None,
        OneRank(),
        f"random {weight_dtype}",
    )
    synchronise(device)
    return Loaded(
        runner=runner,
        scale=scale,
        config=config,
        device=device,
        load_s=time.perf_counter() - started,
    )


def synchronise(device: torch.device) -> None:
    """Wait for all that is enqueued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
