"""What this GPU can do at most, measured: bytes copied and products computed per second."""

import shutil
import subprocess
from typing import Any, Final

import torch

from benchmarks.gpu_scale import Scale
from benchmarks.gpu_timing import device_seconds
from benchmarks.report import say

_REPEATS: Final = 11
_FACTS: Final = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)


def measure_rates(scale: Scale, device: torch.device) -> dict[str, float]:
    """Return rates per second; a copied byte counts twice, for it is read and written.

    ``fp8_flops`` is missing where torch has no such product here.
    """
    rates = {"copy_bytes_per_s": _copy_rate(scale.copy_bytes, device)}
    size = scale.matrix_size
    flops = 2 * size**3
    a = torch.randn(size, size, device=device).to(torch.bfloat16)
    a @ a
    rates["bf16_flops"] = flops / device_seconds(lambda: a @ a, device, repeats=_REPEATS, at_once=4)
    try:
        rates["fp8_flops"] = flops / _fp8_seconds(a)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        say(f"no fp8 products to measure: {error}")  # an older GPU, or a torch without them
    return rates


def _copy_rate(num_bytes: int, device: torch.device) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * num_bytes / device_seconds(lambda: target.copy_(source), device, repeats=_REPEATS)


def _fp8_seconds(matrix: torch.Tensor) -> float:
    a = matrix.to(torch.float8_e4m3fn)
    one = torch.ones((), device=a.device)

    def work() -> None:
        torch._scaled_mm(
            a, a.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    work()
    return device_seconds(work, a.device, repeats=_REPEATS, at_once=4)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return the device's name and memory, and the versions of what uses it."""
    facts: dict[str, Any] = {"device": str(device), "torch": str(torch.__version__)}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        facts |= {
            "device": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": torch.version.cuda,
            "memory_bytes": total,
            "free_bytes": free,
        }
    return facts


def driver_facts() -> dict[str, str]:
    """Return the driver's version and the clocks of this moment; nothing without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(_FACTS)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = found.stdout.strip().splitlines()[:1]
    return dict(zip(_FACTS, first[0].split(", "), strict=False)) if first else {}
