"""The files of an embedded server, without a server."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mixfleet_broker.server_directory import FileLock, ServerDirectory, ServerState


@pytest.fixture
def directory(tmp_path: Path) -> ServerDirectory:
    directory = ServerDirectory(tmp_path)
    directory.create()
    return directory


def test_the_directory_is_made_private_also_when_it_was_not(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir(mode=0o755)
    directory = ServerDirectory(tmp_path)
    directory.create()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_a_state_is_read_as_it_was_written_until_it_is_removed(
    directory: ServerDirectory,
) -> None:
    state = ServerState(pid=12, url="unix:///a/b")
    assert directory.read_state() is None
    directory.write_state(state)
    assert directory.read_state() == state
    directory.remove_state()
    directory.remove_state()
    assert directory.read_state() is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x", "url": "u"}', '{"pid": 1}', "7"])
def test_a_state_that_is_not_legible_is_none(directory: ServerDirectory, content: str) -> None:
    (directory.path / "state.json").write_text(content)
    assert directory.read_state() is None


@pytest.mark.parametrize(("num_bytes", "fits"), [(103, True), (108, False), (300, False)])
def test_a_socket_path_must_fit_the_operating_system(num_bytes: int, fits: bool) -> None:
    data_dir = Path("/" + "x" * (num_bytes - len("//redis/redis.sock")))
    socket = ServerDirectory(data_dir).socket
    assert (socket is not None) == fits
    assert socket is None or len(os.fsencode(socket)) == num_bytes


def test_a_config_for_a_socket_opens_no_port_and_quotes_odd_paths(tmp_path: Path) -> None:
    directory = ServerDirectory(tmp_path / 'a "b" \\ c')
    directory.create()
    directory.write_config(port=0, password="")
    lines = directory.config_file.read_text().splitlines()
    assert "port 0" in lines
    assert "unixsocketperm 700" in lines
    quoted = str(directory.path).replace("\\", "\\\\").replace('"', '\\"')
    assert f'dir "{quoted}"' in lines
    assert not [line for line in lines if line.startswith("requirepass")]


def test_a_config_for_a_port_listens_on_loopback_alone_with_a_password(
    directory: ServerDirectory,
) -> None:
    directory.write_config(port=7000, password="s3cret")
    lines = directory.config_file.read_text().splitlines()
    assert "bind 127.0.0.1" in lines
    assert 'requirepass "s3cret"' in lines
    assert stat.S_IMODE(directory.config_file.stat().st_mode) == 0o600


def test_a_new_log_keeps_the_last_one(directory: ServerDirectory) -> None:
    for text in (b"first\n", b"second\n"):
        log = directory.new_log()
        os.write(log, text)
        os.close(log)
    assert directory.last_log_lines() == "second"
    assert (directory.path / "server.log.1").read_text() == "first\n"


def test_the_last_log_lines_are_the_last_and_few(directory: ServerDirectory) -> None:
    assert directory.last_log_lines().startswith("no log: ")
    directory.log_file.write_text("".join(f"line {i}\n" for i in range(100)))
    lines = directory.last_log_lines().splitlines()
    assert lines[-1] == "line 99"
    assert len(lines) == 12
    directory.log_file.write_text("")
    assert directory.last_log_lines().endswith("server.log is empty")


def test_a_file_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.try_acquire()
    assert first.try_acquire()
    assert not second.try_acquire()
    assert (first.held, second.held) == (True, False)
    first.close()
    first.close()
    assert second.try_acquire()
    second.close()


def test_a_child_that_inherits_a_file_lock_holds_it_until_it_dies(tmp_path: Path) -> None:
    ours, next_one = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert ours.try_acquire()
    with subprocess.Popen(["sleep", "60"], pass_fds=(ours.fd,)) as child:
        ours.close()
        assert not next_one.try_acquire()
        child.kill()
        child.wait()
        assert next_one.try_acquire()
    next_one.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no sockets in the file system")
def test_relative_data_directories_are_made_absolute() -> None:
    assert ServerDirectory(Path("d")).path == Path.cwd() / "d" / "redis"
