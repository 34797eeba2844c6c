"""The engine's own console, as one process and under torchrun."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny_model import tiny_config, write_mistral_checkpoint
from support.tokenizer_files import mistral_file

pytestmark = pytest.mark.slow

QUESTION = "Who wrote « Les Misérables »?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vocab_size=32000, context_length=256)
    folder = write_mistral_checkpoint(tmp_path_factory.mktemp("local") / "mixtral", config)
    shutil.copy(mistral_file("v1"), folder / "tokenizer.model")
    return folder


def run(*command: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], input=typed, capture_output=True, text=True, timeout=100
    )


def chat_options(checkpoint: Path) -> list[str]:
    options = ["--ckpt-dir", str(checkpoint), "--tokenizer", str(checkpoint / "tokenizer.model")]
    return [*options, "--dtype=float32", "--temperature=0", "--max-tokens=12", "--threads=1"]


def test_two_processes_under_torchrun_say_what_one_says(checkpoint: Path) -> None:
    options = [*chat_options(checkpoint), f"--question={QUESTION}", "--stats"]
    alone = run("-m", "mixfleet_engine.chat", *options)
    assert alone.returncode == 0, alone.stderr
    assert re.search(r"\[\d+ \+ 12 tokens", alone.stderr)
    assert len(alone.stdout) > 12
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    together = run(*torchrun, "-m", "mixfleet_engine.chat", *options)
    assert together.returncode == 0, together.stderr
    assert together.stdout == alone.stdout


def test_a_conversation_is_typed_and_a_plain_text_goes_on(checkpoint: Path) -> None:
    typed = "Hello\n/clear\nHello\n/bye\n"
    talk = run("-m", "mixfleet_engine.chat", *chat_options(checkpoint), typed=typed)
    assert talk.returncode == 0, talk.stderr
    first, second = (line.removeprefix(">>> ") for line in talk.stdout.split("\n>>> ")[:2])
    assert first == second.removeprefix(">>> "), "after /clear the same question starts anew"
    plain = run(
        *("-m", "mixfleet_engine.chat", *chat_options(checkpoint), "--plain", "-q", "Once upon")
    )
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip()
    assert plain.stdout != first


def test_an_output_that_takes_nothing_is_one_line(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "mixfleet_engine.chat", *chat_options(checkpoint), "-q", "x"]
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert "Traceback" not in found.stderr


def test_a_wrong_directory_is_one_line(tmp_path: Path) -> None:
    wrong = run("-m", "mixfleet_engine.chat", "--ckpt-dir", str(tmp_path / "nowhere"))
    assert wrong.returncode == 1
    assert len(wrong.stderr.splitlines()) == 1
    assert "nowhere" in wrong.stderr
