"""How a peer is installed: versions pinned, in a folder of its own, once.

Everything runs at the lowest priority. A stamp, written last, says that a folder is complete, so
an interrupted installation is begun anew.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

Say = Callable[[str], None]

STAMP = ".complete"
_LAST_LINES = 3


class PeerError(Exception):
    """A peer is not there, with the reason; the benchmark goes on without it."""


@contextmanager
def once(folder: Path, recipe: str) -> Iterator[bool]:
    """Give whether ``folder`` must be made, and mark it complete when the block ends well.

    Args:
        folder: What is made. It is emptied first when ``recipe`` has changed or the work was cut.
        recipe: All that decides what gets into the folder.
    """
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == digest:
        yield False
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield True
    stamp.write_text(digest)


def run_quietly(command: Sequence[str], log: Path, *, folder: Path | None = None) -> None:
    """Run ``command`` at the lowest priority with its output in ``log``.

    Raises:
        PeerError: It failed or is not installed; the text has the end of what it printed.
    """
    nice = ["nice", "-n", "19"] if shutil.which("nice") else []
    try:
        with log.open("a") as output:
            done = subprocess.run(
                [*nice, *command], stdout=output, stderr=output, cwd=folder, check=False
            )
    except OSError as error:
        raise PeerError(f"{command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        # nice reports a missing command in its own words, which are in the log too.
        raise PeerError(f"{' '.join(command[:4])} ...: {last_line(log)} (whole log: {log})")


def last_line(log: Path) -> str:
    """Return the last lines of ``log`` that say something, as one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return " / ".join([line for line in lines if line][-_LAST_LINES:]) or "it printed nothing"


def make_venv(folder: Path, requirements: Path, say: Say) -> Path:
    """Return the Python of a virtual environment that holds exactly ``requirements``.

    The file names every package with its version, so pip resolves nothing: what a peer would pull
    in for graphics cards stays out. ``torch==2.13.0`` must be a CPU build where pip looks;
    ``PIP_EXTRA_INDEX_URL`` can name torch's own index of them.

    Raises:
        PeerError: pip failed.
    """
    python = folder / "bin" / "python"
    with once(folder, requirements.read_text()) as needed:
        if needed:
            say(f"{folder.parent.name}: installing {requirements.parent.name} into its own venv")
            log = folder / "install.log"
            run_quietly([sys.executable, "-m", "venv", str(folder)], log)
            pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
            run_quietly([*pip, "--no-deps", "-r", str(requirements)], log)
    return python
