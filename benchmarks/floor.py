"""What this machine can do at most: bytes read and products computed per second, and what follows.

    python -m benchmarks.floor JOB.json RESULT.json

A decode step must read every weight that it uses once and compute every product, so its shortest
time is the longer of the two (roofline). Experts make the bytes depend on the batch: see
:func:`experts_hit`.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.measuring import Job

ARRAY_BYTES = 512 << 20
GEMM_SIZE = 2048
_SECONDS = 0.6
"""How long each figure is measured; the best of the calls in that time counts."""
WEIGHT_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "int8": 1.0,
    "int4": 0.5 + 4 / 128,
    "q8_0": 34 / 32,
    "q4_0": 18 / 32,
}
"""Bytes per weight, scales included: one per row is nothing, one in fp32 per group of 128, or
llama.cpp's blocks of 32 with a scale of 2 bytes."""
_RATE = {"fp32": "fp32_flops", "bf16": "bf16_flops"}
"""Quantised weights multiply in int8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a decode step of a model uses."""

    the_rest: int
    """Weights that every step reads: attention and the output matrix."""
    one_expert: int
    """Weights of one expert, all layers."""
    num_experts: int
    experts_per_token: int


def experts_hit(sizes: Sizes, batch: int) -> float:
    """Return how many experts of a layer a step of ``batch`` tokens reads on average.

    All are equally likely. One token leaves an expert out with probability 1 - K/E, and all
    tokens with that to the power of the batch.
    """
    left_out = (1 - sizes.experts_per_token / sizes.num_experts) ** batch
    return sizes.num_experts * (1 - left_out)


def weight_bytes(sizes: Sizes, batch: int, weights: str, hit: float | None = None) -> float:
    """Return the bytes of weights that a decode step reads; arguments as :func:`step_seconds`."""
    read = experts_hit(sizes, batch) if hit is None else hit
    return (sizes.the_rest + read * sizes.one_expert) * WEIGHT_BYTES[weights]


def step_seconds(
    sizes: Sizes, batch: int, weights: str, machine: dict[str, float], hit: float | None = None
) -> float:
    """Return the shortest time of a decode step with short contexts.

    Args:
        sizes: The model's.
        batch: Sequences in the step.
        weights: How they are stored, a key of :data:`WEIGHT_BYTES`.
        machine: What :func:`measure_machine` returns.
        hit: Experts that a layer reads where it was measured; None: as :func:`experts_hit`.
    """
    num_bytes = weight_bytes(sizes, batch, weights, hit)
    active = sizes.the_rest + sizes.experts_per_token * sizes.one_expert
    flops = 2.0 * batch * active
    rate = machine[_RATE.get(weights, "int8_ops")]
    return max(num_bytes / machine["read_bytes_per_s"], flops / rate)


def measure_machine(threads: int) -> dict[str, float]:
    """Return the machine's rates with ``threads`` threads, per second."""
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(ARRAY_BYTES // 4)
    rows, other = values.view(-1, 4096), torch.empty_like(values)
    vector = torch.ones(4096)
    read = min(_best(values.sum), _best(lambda: rows @ vector))
    rates = {
        "read_bytes_per_s": ARRAY_BYTES / read,
        "copy_bytes_per_s": 2 * ARRAY_BYTES / _best(lambda: other.copy_(values)),
    }
    num_operations = 2 * GEMM_SIZE**3
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        square = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
        rates[f"{name}_flops"] = num_operations / _best(lambda s=square: s @ s)  # type: ignore[misc]
    whole = torch.randint(-8, 8, (GEMM_SIZE, GEMM_SIZE), dtype=torch.int8)
    # oneDNN is four times as fast with the second operand's columns in memory order.
    rates["int8_ops"] = num_operations / _best(lambda: torch._int_mm(whole, whole.T))
    return rates


def _best(call: Callable[[], Any]) -> float:
    """Return the seconds of the fastest call."""
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    """Measure and write the result."""
    job, result = Job.from_arguments()
    result.write_text(json.dumps(measure_machine(job.threads)))


if __name__ == "__main__":
    main()
