"""The parts of each stage of the GPU benchmark, in order."""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch

from benchmarks.gpu_bench import Bench, Part
from benchmarks.gpu_decode import decode_table
from benchmarks.gpu_floor import decode_work
from benchmarks.gpu_halves import half_layers
from benchmarks.gpu_kernels import kernel_table, profiled
from benchmarks.gpu_machine import driver_facts, machine_facts, measure_rates
from benchmarks.gpu_offline import itl_beside_prefill, offline
from benchmarks.gpu_peer import peer_table
from benchmarks.gpu_replay import unrecorded_step
from benchmarks.gpu_requests import Figures
from benchmarks.gpu_scale import TINY, Scale
from benchmarks.gpu_warm import warm_up
from mixfleet_engine.plan import weight_bytes

_BF16_ROOM: Final = 8 << 30
"""Beside the weights of a whole bf16 model: KV cache, activations and the system."""


def _machine(bench: Bench, found: Figures) -> None:
    found |= machine_facts(bench.device)
    found["rates"] = measure_rates(bench.scale, bench.device)
    if bench.device.type == "cuda":
        found |= driver_facts()  # now that the clocks are up


def _decode(bench: Bench, found: Figures) -> Iterator[None]:
    loaded = bench.loaded
    return decode_table(loaded, loaded.scale.batches, bench.rates, bench.budget, found)


def _compared(bench: Bench, found: Figures) -> Iterator[None]:
    batches = bench.scale.compared_batches
    return decode_table(bench.loaded, batches, bench.rates, bench.budget, found)


def _halves(bench: Bench, found: Figures) -> Iterator[None]:
    loaded, batches = bench.loaded, bench.scale.kernel_batches
    return half_layers(loaded, batches, bench.rates, bench.budget, found)


def _kernels(bench: Bench, found: Figures) -> Iterator[None]:
    loaded, scale = bench.loaded, bench.scale
    for batch in scale.kernel_batches:
        work = decode_work(
            scale.model,
            batch=batch,
            context=scale.context,
            weight_dtype=loaded.weight_dtype,
            kv_dtype=loaded.kv_dtype,
        )
        kernels = profiled(unrecorded_step(loaded, batch), loaded.device)
        found[str(batch)] = kernel_table(kernels, scale.model.n_layers, work, bench.rates)
        yield


def _warm_up(bench: Bench, found: Figures) -> None:
    warm_up(bench.loaded, bench.budget, found)


def _itl(bench: Bench, found: Figures) -> Iterator[None]:
    return itl_beside_prefill(bench.loaded, bench.budget, found)


def bf16_scale(bench: Bench) -> Scale:
    """Return the sizes at which a bf16 model is run here: all layers where they fit, else few."""
    scale = bench.scale
    if bench.device.type != "cuda":
        return scale.with_layers(scale.few_layers)
    _, total = torch.cuda.mem_get_info(bench.device)
    fits = weight_bytes(scale.model, "bfloat16") + _BF16_ROOM <= total
    return scale if fits else scale.with_layers(scale.few_layers)


def _load_bf16(bench: Bench, found: Figures) -> None:
    bench.load(found, bf16_scale(bench))


def _peer(bench: Bench, found: Figures) -> None:
    peer_table(bf16_scale(bench), bench.device, bench.budget, found)


def _offline_parts(scale: Scale, needed_s: Mapping[str, float]) -> tuple[Part, ...]:
    return tuple(
        Part(
            name=traffic.name,
            needed_s=needed_s[traffic.name],
            measure=lambda bench, found, traffic=traffic: offline(  # type: ignore[misc]
                bench.loaded, traffic, bench.budget, found
            ),
        )
        for traffic in scale.traffics
    )


def stages(scale: Scale) -> dict[str, tuple[Part, ...]]:
    """Return the parts of each stage, in order; the seconds are those of one H100, guessed."""
    small = 0.0 if scale is TINY else 1.0  # what is tiny needs no time

    def part(
        name: str, needed_s: float, measure: Callable[[Bench, Figures], Iterator[None] | None]
    ) -> Part:
        return Part(name=name, needed_s=needed_s * small, measure=measure)

    offline_s = {"1000/1000": 45.0, "128/128": 20.0, "mix": 25.0}
    return {
        "machine": (part("machine", 5, _machine),),
        "int4": (
            part("load", 40, lambda bench, found: bench.load(found, weight_dtype="int4")),
            part("decode", 20, _decode),
            part("halves", 10, _halves),
            part("kernels", 10, _kernels),
        ),
        "int4 not invariant": (
            part(
                "load",
                50,
                lambda bench, found: bench.load(found, weight_dtype="int4", batch_invariant=False),
            ),
            part("decode", 15, _compared),
        ),
        "fp8": (
            part(
                "load",
                40,
                lambda bench, found: bench.load(found, weight_dtype="fp8", kv_dtype="fp8"),
            ),
            part("decode", 20, _decode),
            part("warm-up", 100, _warm_up),
            *_offline_parts(scale, {name: s * small for name, s in offline_s.items()}),
            part("itl", 20, _itl),
            part("halves", 10, _halves),
            part("kernels", 10, _kernels),
        ),
        "bf16": (part("load", 30, _load_bf16), part("decode", 15, _decode)),
        "transformers": (part("decode", 25, _peer),),
    }
