"""Builds llama.cpp for this machine from the source that llama-cpp-python carries."""

import platform
import sys
import tarfile
from pathlib import Path

from benchmarks.peers.installing import Say, once, run_quietly

PACKAGE = "llama-cpp-python==0.3.36"
TARGETS = ("llama-bench", "llama-batched-bench", "llama-quantize")
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TOOLS=ON",
)
_JOBS = 2


def make(folder: Path, say: Say) -> Path:
    """Return the folder of llama.cpp's programs. The first time takes ten minutes on two cores.

    Raises:
        PeerError: The source cannot be downloaded, or cmake or a compiler is missing.
    """
    build = folder / "build"
    # GGML_NATIVE: what one processor built may not run, or not run best, on another.
    with once(build, " ".join([PACKAGE, *_OPTIONS, _instructions()])) as needed:
        if needed:
            log = build / "build.log"
            say(f"llama_cpp: downloading {PACKAGE}")
            source = _source(build, log)
            say("llama_cpp: building it, about ten minutes")
            tree = build / "tree"
            run_quietly(["cmake", "-S", str(source), "-B", str(tree), *_OPTIONS], log)
            compile_all = ["cmake", "--build", str(tree), "--parallel", str(_JOBS), "--target"]
            run_quietly([*compile_all, *TARGETS], log)
    return build / "tree" / "bin"


def _source(build: Path, log: Path) -> Path:
    """Return llama.cpp's source folder, unpacked from the source package on PyPI."""
    name = PACKAGE.partition("==")[0]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name, "--dest"]
    run_quietly([*pip, str(build), PACKAGE], log)
    with tarfile.open(next(build.glob("*.tar.gz"))) as archive:
        archive.extractall(build, filter="data")
    return next(build.glob("*/vendor/llama.cpp"))


def _instructions() -> str:
    """Return what tells processors apart that run different builds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith("flags")), platform.machine())
