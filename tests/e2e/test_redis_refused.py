"""What a newcomer or an operator sees when the Redis given cannot be used."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.redis_server import RedisServer
from support.tls_proxy import Certificates, TlsProxy

pytestmark = pytest.mark.slow

WORKER = ("mixfleet_worker", "--simulated")
EVICTING = ("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_worker_does_not_start_on_a_redis_that_would_drop_jobs() -> None:
    with RedisServer(*EVICTING) as server:
        done = run(*WORKER, "--redis", server.url)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"Error: redis={server.url}: maxmemory 50 MiB")


def test_up_refuses_it_too_before_it_starts_anything(tmp_path: Path) -> None:
    with RedisServer(*EVICTING) as server:
        where = ("--redis", server.url, "--data-dir", tmp_path)
        done = run("mixfleet", "up", "--simulated", "--no-gateway", *where)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: redis={server.url}: maxmemory 50 MiB")
    assert "worker" not in done.stdout


def test_a_worker_does_not_wait_for_a_wrong_certificate_to_become_right(
    redis_url: str, tmp_path: Path
) -> None:
    with TlsProxy(redis_url, Certificates(tmp_path).server_context()) as proxy:
        begun = time.monotonic()
        done = run(*WORKER, "--redis", f"rediss://{proxy.address}/0")
        assert time.monotonic() - begun < 10
    assert done.returncode == 1
    assert "its certificate is not accepted" in done.stderr.splitlines()[-1]
