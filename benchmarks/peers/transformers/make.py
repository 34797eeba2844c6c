"""Installs transformers with CPU torch."""

from pathlib import Path

from benchmarks.peers.installing import Say, make_venv

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def make(folder: Path, say: Say) -> Path:
    """Return the Python that has transformers.

    Raises:
        PeerError: It cannot be installed.
    """
    return make_venv(folder / "venv", REQUIREMENTS, say)
