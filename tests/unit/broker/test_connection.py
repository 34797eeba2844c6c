"""Which Redis is used, and that connecting fails soon and in our words. No server here."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixfleet_broker.connection import connect, find_redis_url
from mixfleet_broker.errors import BrokerUnavailableError, ConfigError
from mixfleet_broker.settings import Settings


def elapsed_s(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


def test_connecting_to_a_socket_that_is_not_there_fails_in_the_time_allowed(
    tmp_path: Path,
) -> None:
    url = f"unix://{tmp_path}/none.sock"

    def give_up() -> None:
        with pytest.raises(BrokerUnavailableError, match=f"no Redis answers at {url}"):
            connect(url, patience_s=0.1)

    assert elapsed_s(give_up) < 0.9


def test_connecting_to_what_is_no_redis_url_is_a_config_error_without_the_password() -> None:
    with pytest.raises(ConfigError) as caught:
        connect("http://:hunter2@host")
    assert str(caught.value).startswith("redis=http://:***@host: must start with redis://")


def test_a_wait_for_replies_that_would_cut_off_every_blocking_read_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"socket_timeout=3 is not longer than .* 5 s"):
        connect("redis://127.0.0.1:1/0?socket_timeout=3", patience_s=None)
    with pytest.raises(BrokerUnavailableError):
        connect("redis://127.0.0.1:1/0?socket_timeout=3", patience_s=0.01, max_block_s=1)


def test_the_redis_that_is_set_is_used() -> None:
    assert find_redis_url(Settings(redis="redis://elsewhere")) == "redis://elsewhere"


def test_without_a_redis_the_error_names_the_data_directory_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailableError) as caught:
        find_redis_url(Settings(data_dir=tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "start one with `mixfleet up`" in str(caught.value)
