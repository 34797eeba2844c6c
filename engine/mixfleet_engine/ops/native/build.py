"""Compiles the C sources of this folder with the machine's own compiler, once per machine."""

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from platformdirs import user_cache_path

from mixfleet_engine.errors import NativeUnavailableError

logger = logging.getLogger(__name__)

SOURCES: Final = Path(__file__).parent
COMPILERS: Final = ("gcc", "cc", "clang")
FLAGS: Final = ("-std=c11", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
LIBRARIES: Final = ("-lm",)
CPU_FLAGS: Final = (
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512_bf16",
    "avx512_vnni",
)
"""What the sources use, as Linux spells it."""
CPU_INFO: Final = Path("/proc/cpuinfo")
TIMEOUT_S: Final = 300
"""A compiler takes seconds; one that takes this long is stuck."""


def cache_folder() -> Path:
    """Return where compiled libraries are kept."""
    return user_cache_path("mixfleet") / "native"


def library_path(
    *, folder: Path | None = None, compilers: Sequence[str] = COMPILERS, cpu_info: Path = CPU_INFO
) -> Path:
    """Return the compiled library, which is compiled first if it is not there.

    Its name is a hash of everything that it depends on, so a new release, compiler or CPU gets
    its own. Several processes may call this at once.

    Args:
        folder: Where libraries are kept; None: the user's cache.
        compilers: Commands to look for, best first.
        cpu_info: Linux's description of the CPU.

    Raises:
        NativeUnavailableError: The CPU lacks an instruction, there is no compiler, it fails, or
            the library cannot be written.
    """
    cpu = checked_cpu(cpu_info)
    compiler, version = find_compiler(compilers)
    path = (folder or cache_folder()) / f"mixfleet-{digest(version, cpu)}.so"
    if not path.exists():
        _compile_to(path, compiler)
    return path


def checked_cpu(cpu_info: Path) -> str:
    """Return the CPU's model and instructions.

    Raises:
        NativeUnavailableError: It lacks one that the sources use; the text names it.
    """
    try:
        lines = cpu_info.read_text().splitlines()
    except OSError as error:
        raise NativeUnavailableError(
            f"{platform.system()} on {platform.machine()} does not say what its CPU can: {error}"
        ) from error
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    flags = found.get("flags", "")
    missing = sorted(set(CPU_FLAGS) - set(flags.split()))
    if missing:
        raise NativeUnavailableError(f"this CPU has no {', '.join(missing)}")
    return f"{found.get('model name', '')} {flags}"


def find_compiler(compilers: Sequence[str]) -> tuple[str, str]:
    """Return the path and the version of the first compiler that is installed.

    Raises:
        NativeUnavailableError: None is.
    """
    for name in compilers:
        path = shutil.which(name)
        if path is not None:
            return path, _run([path, "--version"])
    raise NativeUnavailableError(f"there is no C compiler ({', '.join(compilers)})")


def digest(version: str, cpu: str) -> str:
    """Return what names the library: a hash of sources, flags, compiler version and CPU."""
    found = hashlib.sha256()
    for part in (version, cpu, *FLAGS, *LIBRARIES):
        found.update(part.encode() + b"\0")
    for source in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        found.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return found.hexdigest()[:24]


def _compile_to(path: Path, compiler: str) -> None:
    """Compile under another name and rename, so that nobody ever sees half a library."""
    started = time.monotonic()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise NativeUnavailableError(f"{path.parent} cannot be written: {error}") from error
    try:
        sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
        logger.info("compiling %d C files with %s, once", len(sources), compiler)
        _run([compiler, *FLAGS, "-o", name, *sources, *LIBRARIES])
        Path(name).replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
    logger.info("compiled %s with %s in %.1f s", path, compiler, time.monotonic() - started)


def _run(command: list[str]) -> str:
    """Return what ``command`` prints.

    Raises:
        NativeUnavailableError: It fails; the text has the first lines that it wrote.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[:5])
        raise NativeUnavailableError(f"{command[0]} fails with code {done.returncode}: {said}")
    return done.stdout
