"""Real ranks that hang while they start: the error names the rank and how far it came."""

import re
import sys
import time
from pathlib import Path

import pytest

from mixfleet_worker.group import LEAVE_S, run_ranks
from support import rank_start
from support.processes import children_of
from support.rank_scenario import MODEL
from support.tiny_model import write_hf_checkpoint

pytestmark = pytest.mark.slow

PATIENCE_S = 6.0
"""More than one rank may import torch later than the other."""
IMPORT_S = 40.0
"""Starting Python with torch on a busy machine."""
NOBODY = -1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_checkpoint(tmp_path_factory.mktemp("tiny"), MODEL)


@pytest.fixture(autouse=True)
def tests_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(rank_start.__file__).parent.parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(
    checkpoint: Path, where: str, victim: int, patience_s: float = PATIENCE_S
) -> tuple[int, list[str]]:
    """Return the group's exit status and what it says of its end."""
    program = (sys.executable, "-m", "support.rank_start", str(checkpoint))
    lines: list[str] = []
    status = run_ranks([*program, where, str(victim), str(patience_s)], 2, report=lines.append)
    return status, lines


def test_ranks_that_do_not_hang_start_and_end_well(
    checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start(checkpoint, "nowhere", NOBODY, IMPORT_S) == (0, [])
    assert "Error" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("where", "victim", "named"),
    [
        ("started", 0, r"rank 0 hangs in stage 'started', it does not answer at 127\.0\.0\.1:\d+"),
        ("started", 1, r"rank 1 hangs in stage 'started': nothing new for 6 s"),
        ("opening", 1, r"rank 1 \(process \d+\) hangs in stage 'opening checkpoint': .* for 6 s"),
        ("loading", 0, r"rank 0 \(process \d+\) hangs in stage 'loading weights'.* for 6 s"),
        ("loading", 1, r"rank 1 \(process \d+\) hangs in stage 'loading weights'.* for 6 s"),
    ],
)
def test_a_rank_that_hangs_is_named_and_no_process_stays(
    where: str, victim: int, named: str, checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = set(children_of(1))
    begun = time.monotonic()
    status, lines = start(checkpoint, where, victim)
    assert status == 1
    assert len(lines) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if "Error" in line]
    assert any(re.fullmatch(f"Error: {named}.*", line) for line in errors), errors
    assert time.monotonic() - begun < IMPORT_S + PATIENCE_S + LEAVE_S
    assert set(children_of(1)) <= before
