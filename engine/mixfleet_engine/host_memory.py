"""How much of this machine's memory a process may have: the kernel's figures and its cgroups'.

Torch-free. Containers and batch systems limit memory by cgroups, of which the kernel's own totals
know nothing: a process that takes more than its cgroup's limit is killed.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Bytes of main memory, without swap."""

    total_bytes: int
    """What the machine has, or the cgroup's limit if that is less."""
    available_bytes: int
    """Of that, what is free or can be freed by dropping copies of files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    limit: str
    usage: str
    file_pages: tuple[str, str]
    """Keys of memory.stat: pages of files, which the kernel drops when it needs the room."""


_V2 = _Files(
    limit="memory.max", usage="memory.current", file_pages=("inactive_file", "active_file")
)
_V1 = _Files(
    limit="memory.limit_in_bytes",
    usage="memory.usage_in_bytes",
    file_pages=("total_inactive_file", "total_active_file"),
)


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """Return what this process may have of main memory.

    Without Linux's files: all memory of the machine, whoever uses it.

    Args:
        proc: Where ``meminfo`` and ``self/cgroup`` are.
        cgroups: Where the cgroup file systems are mounted.
    """
    found = _machine_memory(proc / "meminfo")
    for folder, files in _own_cgroups(proc / "self" / "cgroup", cgroups):
        limit = _number(folder / files.limit)
        if limit is None:
            continue
        stat = _table(folder / "memory.stat")
        file_bytes = sum(stat.get(key, 0) for key in files.file_pages)
        used = max(0, (_number(folder / files.usage) or 0) - file_bytes)
        found = HostMemory(
            total_bytes=min(found.total_bytes, limit),
            available_bytes=min(found.available_bytes, max(0, limit - used)),
        )
    return found


def _machine_memory(meminfo: Path) -> HostMemory:
    kib = _table(meminfo)
    if "MemTotal:" in kib and "MemAvailable:" in kib:
        total, available = kib["MemTotal:"] << 10, kib["MemAvailable:"] << 10
        return HostMemory(total_bytes=total, available_bytes=available)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return HostMemory(total_bytes=total, available_bytes=total)


def _own_cgroups(listing: Path, cgroups: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the process's cgroups that count memory, with those above them: each may limit it.

    Worked example: the line ``0::/user/job`` (version 2) means ``/sys/fs/cgroup/user/job``, then
    ``/sys/fs/cgroup/user``, then ``/sys/fs/cgroup``; ``4:memory:/job`` (version 1) means
    ``/sys/fs/cgroup/memory/job``, then ``/sys/fs/cgroup/memory``. In a container the path may be
    one that only the host sees; the mounted root is then the container's own cgroup.
    """
    for line in _lines(listing):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            root, files = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", _V1
        else:
            continue
        folder = root / path.lstrip("/")
        yield folder, files
        while folder != root and root in folder.parents:
            folder = folder.parent
            yield folder, files


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(file: Path) -> int | None:
    """Return the number in ``file``; None where there is no file, or it says ``max``."""
    text = "".join(_lines(file)).strip()
    return int(text) if text.isdecimal() else None


def _table(file: Path) -> dict[str, int]:
    """Return the lines ``key number ...`` of ``file``."""
    rows = (line.split() for line in _lines(file))
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
