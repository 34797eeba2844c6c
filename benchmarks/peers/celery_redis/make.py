"""Installs Celery with its Redis transport."""

from pathlib import Path

from benchmarks.peers.installing import Say, make_venv

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def make(folder: Path, say: Say) -> Path:
    """Return the Python that has Celery.

    Raises:
        PeerError: It cannot be installed.
    """
    return make_venv(folder / "venv", REQUIREMENTS, say)
