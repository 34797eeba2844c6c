"""The embedded server, for real: started, killed, shared, adopted, stopped."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixfleet_broker.connection import connect
from mixfleet_broker.embedded import EmbeddedRedis, running_url
from mixfleet_broker.errors import BrokerUnavailableError
from mixfleet_broker.server_binary import find_server
from mixfleet_broker.server_directory import FileLock, ServerDirectory, ServerState

OWNER = """
import sys, time
from pathlib import Path
from mixfleet_broker.embedded import EmbeddedRedis
print(EmbeddedRedis(Path(sys.argv[1])).start().pid, flush=True)
time.sleep(60)
"""


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def no_server_holds(data_dir: Path) -> bool:
    lock = FileLock(ServerDirectory(data_dir).server_lock_file)
    free = lock.try_acquire()
    lock.close()
    return free


def kill_server(server: EmbeddedRedis) -> None:
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.is_alive)


@pytest.fixture
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short path: a socket's may have about 100 characters."""
    return tmp_path_factory.mktemp("d")


@pytest.fixture
def server(data_dir: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(data_dir) as server:
        yield server


@pytest.fixture
def owner(data_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs the server of ``data_dir``."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(data_dir)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert int(process.stdout.readline())
    yield process
    process.kill()
    process.communicate()
    # Its server lives on, as it should: adopt it and end it.
    EmbeddedRedis(data_dir).start().stop()


def test_a_started_server_listens_on_a_private_socket_and_on_no_port(
    server: EmbeddedRedis, data_dir: Path
) -> None:
    assert server.url == f"unix://{data_dir}/redis/redis.sock"
    with connect(server.url) as redis:
        assert redis.config_get("port") == {"port": "0"}
    assert mode(data_dir / "redis") == 0o700
    assert mode(data_dir / "redis" / "redis.sock") == 0o700
    assert mode(data_dir / "redis" / "state.json") == 0o600
    assert mode(data_dir / "redis" / "server.conf") == 0o600


def test_a_started_server_keeps_every_write_and_drops_none_when_full(
    server: EmbeddedRedis,
) -> None:
    with connect(server.url) as redis:
        config = redis.config_get("append*", "save", "maxmemory-policy")
    assert config["appendonly"] == "yes"
    assert config["appendfsync"] == "everysec"
    assert config["save"] == ""
    assert config["maxmemory-policy"] == "noeviction"


def test_running_url_finds_a_live_server_and_no_stopped_one(data_dir: Path) -> None:
    assert running_url(data_dir) is None
    with EmbeddedRedis(data_dir) as server:
        assert running_url(data_dir) == server.url
    assert running_url(data_dir) is None
    with pytest.raises(BrokerUnavailableError, match="is not started"):
        _ = server.url


def test_running_url_does_not_believe_a_state_of_another_server(
    server: EmbeddedRedis, data_dir: Path
) -> None:
    directory = ServerDirectory(data_dir)
    state = ServerState(pid=server.pid + 1, url=server.url)
    directory.write_state(state)
    assert running_url(data_dir) is None


def test_what_was_written_is_there_after_kill_9_and_restart(
    server: EmbeddedRedis, data_dir: Path
) -> None:
    with connect(server.url, patience_s=10) as redis:
        redis.set("job", b"42")
        first = server.pid
        kill_server(server)
        assert running_url(data_dir) is None
        server.start()
        assert server.pid != first
        assert redis.get("job") == b"42"


def test_what_was_written_is_there_after_a_clean_stop_and_start(data_dir: Path) -> None:
    with EmbeddedRedis(data_dir) as server, connect(server.url) as redis:
        redis.set("job", b"42")
    assert not (data_dir / "redis" / "redis.sock").exists()
    assert "ready to exit" in (data_dir / "redis" / "server.log").read_text()
    with EmbeddedRedis(data_dir) as server, connect(server.url) as redis:
        assert redis.get("job") == b"42"


def test_starting_a_running_server_again_changes_nothing(server: EmbeddedRedis) -> None:
    first = server.pid
    assert server.start().pid == first
    assert server.is_owned
    assert server.is_alive


def test_a_second_start_shares_the_server_and_leaves_it_running(
    owner: subprocess.Popen[str], data_dir: Path
) -> None:
    with EmbeddedRedis(data_dir) as server:
        assert not server.is_owned
        url = server.url
    assert owner.poll() is None
    assert running_url(data_dir) == url


@pytest.mark.slow
def test_a_server_whose_owner_was_killed_is_adopted_with_its_data_and_then_ended(
    owner: subprocess.Popen[str], data_dir: Path
) -> None:
    url = running_url(data_dir)
    assert url is not None
    with connect(url) as redis:
        redis.set("job", b"42")
        owner.kill()
        owner.wait()
        with EmbeddedRedis(data_dir) as server:
            assert server.is_owned
            assert server.url == url
            assert redis.get("job") == b"42"
    assert running_url(data_dir) is None
    assert no_server_holds(data_dir)


def test_the_server_is_out_of_reach_of_ctrl_c_in_our_terminal(server: EmbeddedRedis) -> None:
    assert os.getsid(server.pid) != os.getsid(0)


def test_a_path_too_long_for_a_socket_gets_a_loopback_port_and_a_password(
    tmp_path: Path,
) -> None:
    data_dir = tmp_path / ("long" * 30)
    with EmbeddedRedis(data_dir) as server:
        assert server.url.startswith("redis://:")
        assert "@127.0.0.1:" in server.url
        with connect(server.url) as redis:
            redis.set("job", b"42")
            address = server.url.partition("@")[2]
            with pytest.raises(BrokerUnavailableError, match="refuses the user name or password"):
                connect(f"redis://{address}")
            kill_server(server)
            # The same port and password again, so that clients find it.
            url = server.url
            assert server.start().url == url
            assert redis.get("job") == b"42"


def test_a_server_that_cannot_start_is_an_error_with_its_last_log_lines(data_dir: Path) -> None:
    aof = data_dir / "redis" / "appendonlydir"
    aof.mkdir(parents=True)
    (aof / "appendonly.aof.manifest").write_text("nonsense\n")
    server = EmbeddedRedis(data_dir)
    with pytest.raises(BrokerUnavailableError) as caught:
        server.start()
    assert "ended with status 1" in str(caught.value)
    assert "manifest" in str(caught.value)
    assert not server.is_owned
    assert running_url(data_dir) is None


def test_a_server_that_stays_silent_is_given_up_and_ended(data_dir: Path, tmp_path: Path) -> None:
    mute = tmp_path / "mute-server"
    mute.write_text("#!/bin/sh\necho I will say nothing\nexec sleep 60\n")
    mute.chmod(0o700)
    server = EmbeddedRedis(data_dir, program=mute, start_timeout_s=0.2)
    with pytest.raises(BrokerUnavailableError, match=r"no answer for 0\.2 s(.|\n)*say nothing"):
        server.start()
    # Nothing is left that holds the directory.
    assert no_server_holds(data_dir)


def test_a_second_server_never_starts_while_another_holds_the_directory(data_dir: Path) -> None:
    directory = ServerDirectory(data_dir)
    directory.create()
    held = FileLock(directory.server_lock_file)
    assert held.try_acquire()
    server = EmbeddedRedis(data_dir, start_timeout_s=0.1)
    with pytest.raises(BrokerUnavailableError, match=r"a server holds .*server\.lock; end it"):
        server.start()
    held.close()
    with server.start():
        assert server.is_owned


@pytest.mark.slow
def test_a_server_that_takes_long_to_load_its_data_is_waited_for(
    data_dir: Path, tmp_path: Path
) -> None:
    with EmbeddedRedis(data_dir) as server, connect(server.url) as redis:
        pipeline = redis.pipeline(transaction=False)
        for i in range(6000):
            pipeline.set("key", i)
        pipeline.execute()
    slow = tmp_path / "slow-server"
    # While it loads a server answers after every 1024 commands, here about every 0.25 s.
    slow.write_text(f'#!/bin/sh\nexec {find_server()} "$@" --key-load-delay 200\n')
    slow.chmod(0o700)
    start = time.monotonic()
    with EmbeddedRedis(data_dir, program=slow, start_timeout_s=0.8) as server:
        assert time.monotonic() - start > 1.0, "it did not take long"
        with connect(server.url) as redis:
            assert redis.get("key") == b"5999"


@pytest.mark.slow
def test_a_server_of_ours_that_hangs_can_still_be_stopped(data_dir: Path) -> None:
    server = EmbeddedRedis(data_dir, start_timeout_s=0.1).start()
    os.kill(server.pid, signal.SIGSTOP)
    pid = server.pid
    with pytest.raises(BrokerUnavailableError, match="a server holds"):
        server.start()
    assert server.is_owned
    os.kill(pid, signal.SIGCONT)
    server.stop()
    assert running_url(data_dir) is None
    assert no_server_holds(data_dir)
