"""The half-layers of a decode step, each kind timed by itself over all layers, by CUDA events.

Gigabytes of other weights lie between two layers' calls, so L2 is as cold as in a step. The calls
are recorded once and replayed, so the host does not count. Attention includes its two products
beside the KV cache, and the experts' half the router.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from benchmarks.gpu_budget import Budget
from benchmarks.gpu_floor import Rates, decode_work, step_seconds
from benchmarks.gpu_load import Loaded, synchronise
from benchmarks.gpu_replay import decode_chunks
from benchmarks.gpu_requests import Figures
from benchmarks.gpu_timing import device_seconds
from mixfleet_engine.batch import make_batch
from mixfleet_engine.capture import CudaGraphRecorder, NoRecorder
from mixfleet_engine.model import MixtralModel
from mixfleet_engine.step import StepPlan

HALVES: Final[Mapping[str, tuple[str, ...]]] = {
    "attention": ("qkv", "attention", "wo"),
    "experts": ("up", "down"),
    "output": ("output",),
}
"""Which parts of a step's work each of them does."""
_REPEATS: Final = 7
_LEAST_S: Final = 5.0


@torch.inference_mode()
def half_layers(
    loaded: Loaded, batches: Sequence[int], rates: Rates | None, budget: Budget, found: Figures
) -> Iterator[None]:
    """Fill ``found`` by batch with the seconds of each kind, all layers together.

    Yields after each batch.
    """
    recorder = CudaGraphRecorder() if loaded.device.type == "cuda" else NoRecorder()
    for batch in batches:
        if shortage := budget.shortage(_LEAST_S):
            found["skipped_batches"] = f"{batch} and more: {shortage}"
            return
        rows: Figures = found.setdefault(str(batch), {})
        for name, call in calls(loaded, batch).items():
            call()
            synchronise(loaded.device)
            recorded = recorder.record(call)
            recorded()
            rows[name] = {"seconds": device_seconds(recorded, loaded.device, repeats=_REPEATS)}
        if rates:
            _add_floors(loaded, batch, rates, rows)
        yield


def calls(loaded: Loaded, batch: int) -> dict[str, Callable[[], None]]:
    """Return what enqueues each kind of half-layer for a step of ``batch`` sequences."""
    model: MixtralModel = loaded.runner._model
    cache: Any = loaded.runner._cache
    x = torch.randn(batch, model.config.dim, device=loaded.device)
    plan = StepPlan(chunks=decode_chunks(loaded, batch))
    placed = make_batch(plan, loaded.runner.block_size, loaded.device)

    def attention() -> None:
        for layer in model.layers:
            layer.attention.add_to(x, placed, cache)

    def experts() -> None:
        for layer in model.layers:
            layer.moe.add_to(x)

    def output() -> None:
        model.output(x)

    return {"attention": attention, "experts": experts, "output": output}


def _add_floors(loaded: Loaded, batch: int, rates: Rates, rows: Figures) -> None:
    work = decode_work(
        loaded.scale.model,
        batch=batch,
        context=loaded.scale.context,
        weight_dtype=loaded.weight_dtype,
        kv_dtype=loaded.kv_dtype,
    )
    for name, parts in HALVES.items():
        floor_s = step_seconds({part: work[part] for part in parts}, rates)
        rows[name] |= {"floor_s": floor_s, "of_floor": floor_s / rows[name]["seconds"]}
