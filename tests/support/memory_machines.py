"""Machines for tests of the memory planner."""

from mixfleet_engine.machines import DeviceKind, Machine

GIB = 1 << 30


def machine(
    gib: float, *, num_devices: int = 1, kind: DeviceKind = "cuda", free_gib: float | None = None
) -> Machine:
    """Return a machine of so much memory per device."""
    return Machine(
        name="cpu" if kind == "cpu" else "GPU",
        kind=kind,
        num_devices=num_devices,
        memory_bytes=int(gib * GIB),
        free_bytes=None if free_gib is None else int(free_gib * GIB),
    )
