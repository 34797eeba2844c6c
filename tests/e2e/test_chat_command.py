"""``mixfleet chat`` with the whole fleet behind it: Redis and real worker processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixfleet import Client
from support.terminal import CTRL_C, CTRL_D, Terminal
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

CHAT = (sys.executable, "-m", "mixfleet", "chat", "--seed", "1", "--max-tokens", "20")
FAST = ("--simulated", "--simulated-step-s", "0")
SLOW = ("--simulated", "--simulated-step-s", "0.1")
"""An answer takes two seconds, long enough to be interrupted."""


@pytest.fixture
def environment(redis_url: str, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MIXFLEET_")}
    return {
        **kept,
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path),
        "MIXFLEET_DATA_DIR": str(tmp_path),
        "MIXFLEET_REDIS": redis_url,
    }


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


def whole_answer(client: Client, question: str) -> str:
    return client.chat(question, seed=1, max_tokens=20).result().text


def test_one_question_gets_the_answer_that_the_client_library_gets(
    environment: dict[str, str], redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST):
        done = subprocess.run(
            [*CHAT, "-q", "Hi"], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == whole_answer(client, "Hi") + "\n"


def test_a_worker_killed_in_mid_answer_is_not_seen_in_the_output(
    environment: dict[str, str], redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "first", tmp_path, *SLOW) as first:
        process = subprocess.Popen([*CHAT, "-q", "Hi"], env=environment, stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            begin = process.stdout.read(10)
            first.kill()
            with WorkerProcess(redis_url, "second", tmp_path, *FAST):
                rest, _ = process.communicate(timeout=60)
                expected = whole_answer(client, "Hi")
    assert process.returncode == 0
    assert (begin + rest).decode() == expected + "\n"


def test_a_conversation_with_a_stopped_answer_on_a_terminal(
    environment: dict[str, str], redis_url: str, client: Client, tmp_path: Path
) -> None:
    with (
        WorkerProcess(redis_url, "w1", tmp_path, *SLOW) as worker,
        Terminal(CHAT, environment) as terminal,
    ):
        begin = whole_answer(client, "Hi")[:10]
        terminal.wait_for("listens.")
        terminal.wait_for(">>>")
        terminal.press("Hi\r")
        terminal.wait_for(f"\r{begin}")
        terminal.press(CTRL_C)
        terminal.wait_for("[stopped]")
        terminal.wait_for(">>>")
        until(lambda: has_nothing_to_do(worker), "the worker has dropped the job")
        terminal.press("/regen\r")
        terminal.wait_for(f"\r{begin}")
        terminal.wait_for("[cut at")
        terminal.wait_for(">>>")
        terminal.press(CTRL_D)
        assert terminal.wait_for_exit() == 0


def has_nothing_to_do(worker: WorkerProcess) -> bool:
    record = worker.record()
    return record is not None and record.in_flight == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_chat_that_is_told_to_end_cancels_its_answer(
    number: signal.Signals, environment: dict[str, str], redis_url: str, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW) as worker:
        process = subprocess.Popen([*CHAT, "-q", "Hi"], env=environment, stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            process.stdout.read(10)
            process.send_signal(number)
            assert process.wait(timeout=20) == 128 + number
        until(lambda: "lease gone" in worker.log, "the worker has dropped the job")
