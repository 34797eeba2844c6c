"""`mixfleet up` as a newcomer meets it, with the simulated engine."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from mixfleet import Client
from mixfleet_broker.embedded import EmbeddedRedis, running_url
from support.worker_process import until

pytestmark = pytest.mark.slow

UP = (
    *(sys.executable, "-m", "mixfleet", "up", "--simulated", "--simulated-step-s", "0"),
    *("--listen", "127.0.0.1:0"),
)


class UpProcess:
    """One `mixfleet up` in a data directory of its own."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.data_dir = data_dir
        self._out = data_dir.parent / "up.out"
        environment = {k: v for k, v in os.environ.items() if k != "REDIS_URL"}
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [*UP, "--data-dir", str(data_dir), *arguments],
                stdout=out,
                stderr=out,
                env=environment,
            )

    @property
    def output(self) -> str:
        return self._out.read_text()

    def await_line(self, pattern: str) -> str:
        until(lambda: re.search(pattern, self.output) is not None, f"{pattern}", 60.0)
        found = re.search(pattern, self.output)
        assert found is not None
        return found[found.re.groups]

    def worker_pid(self) -> int:
        return int(self.await_line(r"worker 1: process (\d+), log"))

    def gateway_url(self) -> str:
        return self.await_line(r"gateway (http://127\.0\.0\.1:\d+) \(OpenAI at /v1")

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[UpProcess]:
    running = UpProcess(tmp_path / "data")
    yield running
    if running.process.poll() is None:
        running.end()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def serves(url: str) -> bool:
    try:
        return requests.get(f"{url}/livez", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def ask(data_dir: Path) -> str:
    url = running_url(data_dir)
    assert url is not None
    with Client(url) as client:
        return client.chat("hello", temperature=0.0, seed=1).result().text


def test_one_command_starts_everything_and_ctrl_c_ends_it(up: UpProcess) -> None:
    up.await_line("ready in")
    assert "chat" in up.output
    assert "from mixfleet import Client" in up.output
    assert len(ask(up.data_dir).split()) >= 19
    worker_pid, url = up.worker_pid(), up.gateway_url()
    assert serves(url)
    assert up.end() == 0
    assert not is_running(worker_pid)
    assert not serves(url)
    assert running_url(up.data_dir) is None


def test_a_second_one_says_that_one_is_running(up: UpProcess) -> None:
    up.await_line("ready in")
    second = subprocess.run(
        [*UP, "--data-dir", str(up.data_dir)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 1
    assert f"running already for {up.data_dir} (process {up.process.pid})" in second.stderr
    assert ask(up.data_dir)


def test_a_worker_that_dies_is_started_again(up: UpProcess) -> None:
    up.await_line("ready in")
    first = up.worker_pid()
    os.kill(first, signal.SIGKILL)
    up.await_line(rf"process {first} ended \(signal 9\)")
    assert int(up.await_line(r"started again, process (\d+)")) != first
    assert ask(up.data_dir)


def test_a_chat_goes_through_the_gateway_that_it_started(up: UpProcess) -> None:
    url = up.gateway_url()
    up.await_line("ready in")
    model = requests.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
    answer = requests.post(
        f"{url}/v1/chat/completions",
        json={"model": model, "messages": [{"role": "user", "content": "hello"}]},
        timeout=30,
    )
    assert answer.json()["choices"][0]["message"]["content"], answer.text


def test_a_port_that_is_taken_is_named_with_the_flag_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        up = UpProcess(tmp_path / "data", "--listen", address)
        assert up.process.wait(timeout=30) == 1
    assert f"listen={address}" in up.output
    assert "--listen HOST:PORT" in up.output
    assert "redis: embedded" not in up.output


def test_without_a_gateway_none_is_started(tmp_path: Path) -> None:
    up = UpProcess(tmp_path / "data", "--no-gateway")
    try:
        up.await_line("ready in")
        assert "http://" not in up.output
        assert not (up.data_dir / "logs" / "gateway.log").exists()
    finally:
        assert up.end() == 0


def test_a_redis_that_dies_is_started_again_with_its_data(up: UpProcess) -> None:
    up.await_line("ready in")
    before = ask(up.data_dir)
    os.kill(int(up.await_line(r"embedded, process (\d+)")), signal.SIGKILL)
    up.await_line("redis: died")
    until(lambda: running_url(up.data_dir) is not None, "redis is back")
    assert ask(up.data_dir) == before


def test_a_redis_that_is_given_is_named_with_its_version_and_warnings(
    redis_url: str, tmp_path: Path
) -> None:
    up = UpProcess(tmp_path / "data", "--redis", redis_url)
    try:
        up.await_line("ready in")
        line = rf"redis: {redis_url}, (Redis|Valkey) [\d.]+, 1 warning: see `mixfleet doctor` \("
        assert re.search(line, up.output)
    finally:
        assert up.end() == 0


def test_what_to_type_next_finds_a_fleet_behind_a_prefix(redis_url: str, tmp_path: Path) -> None:
    up = UpProcess(tmp_path / "data", "--redis", redis_url, "--key-prefix", "team:")
    try:
        up.await_line("ready in")
        command = shlex.split(up.await_line(r"(\S*mixfleet chat.*)\n"))
        answer = subprocess.run(
            [sys.executable, "-m", "mixfleet", *command[1:], "-q", "hello"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        assert len(answer.stdout.split()) >= 19
        assert "with MIXFLEET_KEY_PREFIX=team:" in up.output
    finally:
        assert up.end() == 0


def test_a_worker_that_cannot_start_is_shown_and_everything_ends(tmp_path: Path) -> None:
    up = UpProcess(tmp_path / "data", "--max-batch-size", "8", "--max-step-tokens", "4")
    assert up.process.wait(timeout=30) == 1
    assert "max_step_tokens=4" in up.output
    assert running_url(up.data_dir) is None


def test_workers_and_gateway_end_by_themselves_when_up_was_killed(up: UpProcess) -> None:
    up.await_line("ready in")
    worker_pid, url = up.worker_pid(), up.gateway_url()
    up.process.kill()
    up.process.wait()
    until(lambda: not is_running(worker_pid), "the worker has ended")
    until(lambda: not serves(url), "the gateway has ended")
    with EmbeddedRedis(up.data_dir):  # adopts the server that was left, and ends it
        assert running_url(up.data_dir) is not None
    assert running_url(up.data_dir) is None
