"""Compiles what launches of kernels would run, for a GPU that is not there.

Run as a program in a process without ``TRITON_INTERPRET``: it calls the functions that its command
line names (``module:function``) under a stand-in for the GPU's driver. Every launch in them is
compiled down to machine code by Triton and NVIDIA's assembler, and none runs::

    python -m support.compiling 90 kernels.launches_norm:launches

It prints a JSON line per kernel: name, shared memory in bytes, registers, bytes spilled, and by
which instruction it multiplies matrices.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
"""Matrix instructions, those of the newer devices first."""


class AbsentGpu:
    """Stands in for the driver of a GPU of compute capability ``capability``, 80 or 90."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """Return the default stream."""
        return 0


@contextmanager
def compiled_only(capability: int) -> Iterator[list[Any]]:
    """Yield a list that grows by each kernel that a launch compiles; nothing runs."""
    found: list[Any] = []
    plain_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:  # noqa: ARG001
        kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(kernel is not other for other in found):
            found.append(kernel)
        return kernel

    triton.runtime.driver.set_active(AbsentGpu(capability))
    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = plain_run


def resources(kernel: Any) -> dict[str, Any]:
    """Return what a compiled kernel needs of a multiprocessor."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers = re.search(r"REG:(\d+)", text)
    spilled = re.search(r"STACK:(\d+)", text)
    assert registers is not None, text
    assert spilled is not None, text
    return {
        "name": kernel.name,
        "shared": kernel.metadata.shared,
        "registers": int(registers[1]),
        "spilled": int(spilled[1]),
        "product": next((name for name in PRODUCTS if name in kernel.asm["ptx"]), None),
        "widest_sum": widest_sum(kernel.asm["ttgir"]),
    }


def widest_sum(ttgir: str) -> int:
    """Return the length of the longest axis that is summed up as its layout has it; 0: none is."""
    found = re.finditer(
        r'"tt\.reduce"\([^)]*\) <\{axis = (\d+) : i32\}> \(\{(.*?)\}\) : \(tensor<([\dx]+)x',
        ttgir,
        re.S,
    )
    sums = (reduced for reduced in found if "arith.addf" in reduced[2])
    return max((int(reduced[3].split("x")[int(reduced[1])]) for reduced in sums), default=0)


def main(capability: str, *names: str) -> None:
    """Compile what the named functions launch and print what it needs."""
    for name in names:
        module, _, function = name.partition(":")
        with compiled_only(int(capability)) as found:
            getattr(importlib.import_module(module), function)()
        for kernel in found:
            print(json.dumps(resources(kernel)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
