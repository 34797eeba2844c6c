"""Machines that a model may run on: how many devices of which memory."""

from dataclasses import dataclass, replace
from typing import Final, Literal, Self

_GIB: Final = 1 << 30

DeviceKind = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Equal devices that share one model, each holding one rank of it."""

    name: str
    """Of one device: ``H100 80GB``, ``cpu``."""
    kind: DeviceKind
    num_devices: int
    memory_bytes: int
    """Of one device, as a process sees it: less than the name says."""
    free_bytes: int | None = None
    """What other processes have left of it; None: all."""

    @property
    def available_bytes(self) -> int:
        """Memory of one device that this process may have."""
        if self.free_bytes is None:
            return self.memory_bytes
        return min(self.free_bytes, self.memory_bytes)

    @property
    def label(self) -> str:
        """Name with the number of devices, as people write it: ``4x H100 80GB``."""
        if self.kind == "cuda":
            return f"{self.num_devices}x {self.name}"
        return self.name if self.num_devices == 1 else f"{self.num_devices} ranks on {self.name}"

    def with_devices(self, num_devices: int) -> Self:
        """Return the same with another number of the same devices."""
        return replace(self, num_devices=num_devices)


_DEVICES: Final = (
    ("A100 80GB", 79.6, (1, 2, 4, 8)),
    ("H100 80GB", 79.6, (1, 2, 4, 8)),
    ("H200 141GB", 139.8, (1,)),
    ("A6000 48GB", 47.5, (1, 2, 4)),
    ("6000 Ada 48GB", 47.5, (1, 2, 4)),
    ("24GB", 23.6, (2, 4, 8)),
)
"""Name, memory in GiB as CUDA reports it (ECC off where it can be), and how many make a machine."""


def named_machines() -> tuple[Machine, ...]:
    """Return the machines that Mixtral models are usually run on, by device, small ones first."""
    return tuple(
        Machine(name=name, kind="cuda", num_devices=count, memory_bytes=int(gib * _GIB))
        for name, gib, counts in _DEVICES
        for count in counts
    )
