"""What the system knows of processes. Linux."""

from pathlib import Path


def children_of(parent: int) -> list[int]:
    """Process ids of the children of ``parent``."""
    return [pid for pid in _all() if (fields := _status(pid)) and int(fields[1]) == parent]


def alive(pid: int) -> bool:
    """Whether the process runs or is stopped; one that is only not yet waited for is dead."""
    fields = _status(pid)
    return fields is not None and fields[0] not in "ZX"


def stopped(pid: int) -> bool:
    """Whether the process was stopped by a signal."""
    fields = _status(pid)
    return fields is not None and fields[0] == "T"


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _all() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _status(pid: int) -> list[str] | None:
    """State, parent and the rest of the line; None when there is no such process."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return line.rpartition(") ")[2].split()
