"""Connections to a real server that dies, comes back, hangs, or refuses."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixfleet_broker.connection import connect, find_redis_url
from mixfleet_broker.embedded import EmbeddedRedis
from mixfleet_broker.errors import BrokerUnavailableError
from mixfleet_broker.settings import Settings


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path_factory.mktemp("d")) as server:
        yield server


def kill(server: EmbeddedRedis) -> None:
    os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while server.is_alive:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def later(action: Callable[[], object]) -> threading.Thread:
    """Do it in a thread, while this one waits for Redis."""
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_replies_are_bytes(redis_url: str) -> None:
    with connect(redis_url) as redis:
        redis.set("a", "é")
        assert redis.get("a") == "é".encode()


def test_a_read_of_a_stream_has_the_same_shape_with_every_redis_py(redis_url: str) -> None:
    with connect(redis_url) as redis:
        redis.xadd("s", {"k": "v"}, id="1-1")
        assert redis.xread({"s": "0-0"}) == [[b"s", [(b"1-1", {b"k": b"v"})]]]


def test_a_blocking_read_may_last_as_long_as_was_said(redis_url: str) -> None:
    with connect(redis_url, patience_s=0.1, max_block_s=0.3) as redis:
        start = time.monotonic()
        assert redis.blpop(["nothing"], timeout=0.3) is None
        assert time.monotonic() - start >= 0.29


def test_a_patient_client_goes_on_after_the_server_was_killed_and_restarted(
    server: EmbeddedRedis,
) -> None:
    with connect(server.url, patience_s=None) as redis:
        redis.set("job", "42")
        kill(server)
        restart = later(server.start)
        assert redis.get("job") == b"42"
        restart.join()


def test_a_patient_client_waits_for_a_server_that_is_not_there_yet(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "d")
    start = later(server.start)
    with connect(f"unix://{tmp_path}/d/redis/redis.sock", patience_s=None) as redis:
        assert redis.ping()
    start.join()
    server.stop()


def test_a_client_in_a_hurry_gets_a_typed_error_from_any_command(server: EmbeddedRedis) -> None:
    with connect(server.url, patience_s=0.1) as redis:
        redis.ping()
        kill(server)
        with pytest.raises(BrokerUnavailableError, match="no Redis answers at unix://"):
            redis.get("a")
        with redis.pipeline() as pipeline:
            pipeline.get("a")
            with pytest.raises(BrokerUnavailableError):
                pipeline.execute()
        server.start()
        assert redis.get("a") is None


def test_a_stop_event_frees_a_client_that_would_wait_for_ever(server: EmbeddedRedis) -> None:
    stop = threading.Event()
    with connect(server.url, patience_s=None, stop=stop) as redis:
        redis.ping()
        kill(server)
        stopping = later(stop.set)
        with pytest.raises(BrokerUnavailableError):
            redis.get("a")
        stopping.join()


@pytest.mark.slow
def test_a_server_that_hangs_is_found_without_waiting_for_the_longest_block(
    server: EmbeddedRedis,
) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(BrokerUnavailableError):
            connect(server.url, patience_s=0.5, max_block_s=60)
        assert time.monotonic() - start < 5
    finally:
        os.kill(server.pid, signal.SIGCONT)


def test_a_password_is_sent_and_a_wrong_one_is_an_error_at_once(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / ("long" * 30)) as server:
        password, at, address = server.url.removeprefix("redis://:").partition("@")
        assert password
        with connect(server.url) as redis:
            assert redis.ping()
        for url in (f"redis://:wrong{at}{address}", f"redis://{address}"):
            with pytest.raises(BrokerUnavailableError, match="refuses the user name or password"):
                connect(url, patience_s=None)


def test_the_embedded_server_of_the_data_directory_is_found(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings = Settings(data_dir=tmp_path_factory.mktemp("d"))
    with EmbeddedRedis(settings.data_dir) as server:
        assert find_redis_url(settings) == server.url
    with pytest.raises(BrokerUnavailableError):
        find_redis_url(settings)


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_a_port_on_which_nobody_listens_is_a_typed_error_with_and_without_tls(scheme: str) -> None:
    with pytest.raises(BrokerUnavailableError, match=f"at {scheme}://127.0.0.1:1/0"):
        connect(f"{scheme}://127.0.0.1:1/0", patience_s=0.1)
