import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mixfleet import chat, local
from mixfleet.local import local_command
from mixfleet_broker.errors import MissingExtraError


def test_the_command_is_the_engines_console_with_what_was_given() -> None:
    command = local_command(
        Path("/models/m"),
        question="-n?",
        system="Be kind.",
        sampling={"temperature": 0.5, "top_k": 7, "seed": 3},
        shows_stats=True,
    )
    assert command[:3] == [sys.executable, "-m", "mixfleet_engine.chat"]
    assert command[3:] == [
        *("--ckpt-dir", "/models/m", "--temperature=0.5", "--top-k=7", "--seed=3"),
        *("--system=Be kind.", "--question=-n?", "--stats"),
    ]


def test_what_only_a_fleet_has_is_refused_by_name() -> None:
    with pytest.raises(click.UsageError, match="--stop works with a fleet only"):
        local_command(
            Path("m"), question=None, system=None, sampling={"stop": ("x",)}, shows_stats=False
        )


def test_without_torch_the_text_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"mixfleet\[worker\]"):
        local_command(Path("m"), question=None, system=None, sampling={}, shows_stats=False)


def test_chat_becomes_the_engines_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def execv(program: str, arguments: list[str]) -> None:
        assert program == sys.executable
        started.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    result = CliRunner().invoke(chat.chat, ["--local", str(tmp_path), "-q", "Hello?"])
    assert result.exit_code == 0, result.output
    assert started[0][-1] == "--question=Hello?"
    assert str(tmp_path) in started[0]


def test_json_needs_a_fleet(tmp_path: Path) -> None:
    result = CliRunner().invoke(chat.chat, ["--local", str(tmp_path), "-q", "x", "--json"])
    assert result.exit_code == 2
    assert "--json works with a fleet only" in result.output
