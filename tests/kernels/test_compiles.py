"""Every kernel at Mixtral's true shapes, down to machine code, for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""What a program may have."""
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async"}
MULTIPLIES = ("_gemm", "_decode_splits", "_prefill_rows")
"""In tiles of at least 64 rows, what a warp group of the newer ones takes."""
MOST_SPILLED = 128
"""Bytes of a thread. Attention over a prompt keeps two results at once."""
EVERYWHERE = [
    "align:launches", "attention:launches", "combine:launches", "gemm:int4_decode",
    "gemm:int4_prefill", "gemm:int8", "gemm:plain", "gemm:uncommon", "gemv:launches",
    "norm:launches", "rank_sum:launches", "router:launches",
]  # fmt: skip
WITH_FP8 = [
    "attention:launches_fp8", "gemm:fp8", "gemm:fp8_weights_only", "gemv:launches_fp8",
    "norm:launches_fp8", "quant:launches_fp8",
]  # fmt: skip


def compiled(capability: int, launches: list[str]) -> list[dict[str, Any]]:
    """What each kernel of these launches needs; made where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    names = [f"kernels.launches_{launch}" for launch in launches]
    done = subprocess.run(
        [sys.executable, "-m", "support.compiling", str(capability), *names],
        cwd=HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_fits(capability: int) -> None:
    found = compiled(capability, EVERYWHERE + (WITH_FP8 if capability >= 89 else []))
    assert len(found) > 40
    for kernel in found:
        assert kernel["shared"] <= SHARED_BYTES[capability], kernel
        assert kernel["spilled"] <= MOST_SPILLED, kernel
        if kernel["name"] in MULTIPLIES:
            assert kernel["product"] == PRODUCTS[capability], kernel


def test_every_file_of_launches_is_compiled() -> None:
    files = {file.stem.removeprefix("launches_") for file in HERE.glob("launches_*.py")}
    assert {launch.partition(":")[0] for launch in EVERYWHERE + WITH_FP8} == files
