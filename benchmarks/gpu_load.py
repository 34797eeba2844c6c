"""Loads a random model of any size and form as the engine loads any, and makes engines of it."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.gpu_scale import Scale
from benchmarks.gpu_weights import RandomCheckpoint
from mixfleet_engine.config import EngineConfig, KvDtype, WeightDtype
from mixfleet_engine.engine import Engine
from mixfleet_engine.loading import make_runner, resolve_device, resolve_dtype
from mixfleet_engine.ranks import OneRank
from mixfleet_engine.scheduler import Scheduler

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
        scheduler = Scheduler(
            num_blocks=self.runner.num_blocks,
            block_size=self.runner.block_size,
            max_batch_size=self.scale.max_batch_size,
            max_step_tokens=self.config.max_step_tokens,
            context_length=self.config.context_of(self.scale.model),
            vocab_size=self.scale.model.vocab_size,
            prefix_cache=self.config.prefix_cache,
            itl_target_s=itl_target_s,
        )
        return Engine(self.runner, scheduler, pipelined=self.device.type == "cuda")


def load(
    scale: Scale,
    *,
    weight_dtype: WeightDtype = "auto",
    kv_dtype: KvDtype = "auto",
    batch_invariant: bool = True,
) -> Loaded:
    """Make a random model and load it.

    Raises:
        NotMeasurableError: The engine cannot give up batch invariance.
    """
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
        **_invariance(batch_invariant=batch_invariant),
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


def _invariance(*, batch_invariant: bool) -> dict[str, Any]:
    """Return the setting that turns batch invariance off; none where it is on, as by default."""
    if batch_invariant:
        return {}
    if "batch_invariant" not in {field.name for field in dataclasses.fields(EngineConfig)}:
        raise NotMeasurableError("this engine has no setting batch_invariant")
    return {"batch_invariant": False}
