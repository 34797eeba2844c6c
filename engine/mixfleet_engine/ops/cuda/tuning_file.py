"""What tuning found, on disk: one JSON file for each GPU, Triton and state of the kernels.

The file is a convenience. Nothing that is wrong with it stops anything: it is logged, and then the
choices are found again.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
import triton
from platformdirs import user_cache_path

logger = logging.getLogger(__name__)

Fields = dict[str, Any]
"""A candidate's fields by name: numbers, texts, None."""
SOURCES: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedFor:
    """All that a choice depends on beside its key."""

    device: str
    """The GPU's name, such as ``NVIDIA H100 80GB HBM3``."""
    capability: str
    triton: str
    kernels: str
    """A hash of the kernels' sources."""

    @classmethod
    def here(cls, device: torch.device) -> Self:
        """Return what describes a GPU of this machine and this release."""
        major, minor = torch.cuda.get_device_capability(device)
        return cls(
            device=torch.cuda.get_device_name(device),
            capability=f"{major}.{minor}",
            triton=triton.__version__,
            kernels=sources_digest(SOURCES),
        )

    @property
    def file_name(self) -> str:
        """A name that says what the file is of, as any file system can store it."""
        parts = (self.device, f"sm{self.capability}", f"triton{self.triton}", self.kernels)
        return "_".join(re.sub(r"[^\w.]+", "-", part) for part in parts) + ".json"


def sources_digest(folder: Path) -> str:
    """Return a hash of a folder's Python files."""
    found = hashlib.sha256()
    for source in sorted(folder.glob("*.py")):
        found.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def cache_folder() -> Path:
    """Return where choices are kept."""
    return user_cache_path("mixfleet") / "tuning"


class TuningFile:
    """The choices of one `TunedFor`."""

    def __init__(self, folder: Path, tuned_for: TunedFor) -> None:
        self.path: Final = folder / tuned_for.file_name
        self._header: Final = asdict(tuned_for)
        self._writable = True

    def read(self) -> dict[str, Fields]:
        """Return the choices by key; none where there is no file, or one that cannot be used."""
        try:
            found = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read, kernels are tuned anew: %s", self.path, error)
            return {}
        if not isinstance(found, dict) or found.get("tuned_for") != self._header:
            logger.warning("%s is of another machine, kernels are tuned anew", self.path)
            return {}
        choices = found.get("choices")
        if not isinstance(choices, dict):
            logger.warning("%s has no choices, kernels are tuned anew", self.path)
            return {}
        return choices

    def add(self, choices: Mapping[str, Fields]) -> None:
        """Write these choices beside what other processes have written meanwhile."""
        if not self._writable:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._replace({**self.read(), **choices})
        except OSError as error:
            self._writable = False
            logger.warning(
                "%s cannot be written, so kernels are tuned at each start: %s", self.path, error
            )

    def _replace(self, choices: Mapping[str, Fields]) -> None:
        """Write under another name and rename, so that nobody ever reads half a file."""
        text = json.dumps({"tuned_for": self._header, "choices": choices}, indent=1, sort_keys=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix="tuning-", suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text + "\n")
            Path(name).replace(self.path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
