"""Where an embedded server is to listen, without a server."""

import socket
from pathlib import Path

import pytest

from mixfleet_broker.redis_url import checked_redis_url
from mixfleet_broker.server_address import choose_address
from mixfleet_broker.server_directory import ServerDirectory, ServerState


@pytest.fixture
def directory(tmp_path: Path) -> ServerDirectory:
    """One whose path is too long for a socket."""
    directory = ServerDirectory(tmp_path / ("long" * 30))
    directory.create()
    return directory


def test_a_short_path_gives_a_socket_without_a_password() -> None:
    address = choose_address(ServerDirectory(Path("/data dir")))
    assert address.url == "unix:///data%20dir/redis/redis.sock"
    assert (address.port, address.password) == (0, "")


def test_a_long_path_gives_a_free_port_and_a_new_password(directory: ServerDirectory) -> None:
    first, second = choose_address(directory), choose_address(directory)
    assert first.url == f"redis://:{first.password}@127.0.0.1:{first.port}/0"
    assert checked_redis_url(first.url) == first.url
    assert len(first.password) == 32
    assert first.password != second.password
    assert first.password not in repr(first)


def test_the_address_of_a_killed_server_is_taken_again(directory: ServerDirectory) -> None:
    first = choose_address(directory)
    directory.write_state(ServerState(pid=1, url=first.url))
    assert choose_address(directory) == first


def test_an_address_that_somebody_else_has_taken_is_not(directory: ServerDirectory) -> None:
    first = choose_address(directory)
    directory.write_state(ServerState(pid=1, url=first.url))
    with socket.socket() as other:
        other.bind(("127.0.0.1", first.port))
        other.listen()
        assert choose_address(directory).port != first.port


@pytest.mark.parametrize("url", ["unix:///gone/redis.sock", "redis://127.0.0.1:7000/0"])
def test_an_address_of_another_kind_is_not_taken_again(
    directory: ServerDirectory, url: str
) -> None:
    directory.write_state(ServerState(pid=1, url=url))
    address = choose_address(directory)
    assert address.password
    assert address.url != url
