"""What this machine computes on and how much memory that has, as the planner wants to know it."""

import os
from dataclasses import dataclass

import torch

from mixfleet_engine.host_memory import host_memory
from mixfleet_engine.machines import Machine
from mixfleet_engine.ops.cpu import bfloat16_is_fast


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFacts:
    """What the installed torch is and can do here."""

    version: str
    threads: int
    """That one operation uses unless told otherwise."""
    num_cores: int
    """That this process may use."""
    cuda: str | None
    """CUDA version that torch was built for; None: built without."""
    bfloat16: bool
    """Whether the device multiplies bf16 itself."""


def machine_of(device: torch.device, world: int = 1) -> Machine:
    """Return the memory behind ``device``, which is one of ``world`` that share a model.

    The ranks of a CPU share one memory, so each counts with its part of it.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Machine(
            name=torch.cuda.get_device_name(device),
            kind="cuda",
            num_devices=world,
            memory_bytes=total,
            free_bytes=free,
        )
    memory = host_memory()
    return Machine(
        name="cpu",
        kind="cpu",
        num_devices=world,
        memory_bytes=memory.total_bytes // world,
        free_bytes=memory.available_bytes // world,
    )


def measured_free_bytes(device: torch.device) -> int | None:
    """Return what this process may still take of a GPU's memory; None: not a GPU.

    What torch holds of it but does not use counts as free.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # pieces that loading left would be too small for the KV cache
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def found_machine() -> Machine:
    """Return all CUDA devices of this machine as one group, or its CPU where there are none.

    A group is as good as its smallest and fullest device.
    """
    if not torch.cuda.is_available():
        return machine_of(torch.device("cpu"))
    count = torch.cuda.device_count()
    each = [machine_of(torch.device("cuda", index)) for index in range(count)]
    return Machine(
        name=min(each, key=lambda machine: machine.memory_bytes).name,
        kind="cuda",
        num_devices=count,
        memory_bytes=min(machine.memory_bytes for machine in each),
        free_bytes=min(machine.available_bytes for machine in each),
    )


def torch_facts() -> TorchFacts:
    """Return what this process's torch is."""
    has_cuda = torch.cuda.is_available()
    affinity = getattr(os, "sched_getaffinity", None)
    return TorchFacts(
        version=str(torch.__version__),
        threads=torch.get_num_threads(),
        num_cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        cuda=torch.version.cuda,
        bfloat16=torch.cuda.is_bf16_supported() if has_cuda else bfloat16_is_fast(),
    )
