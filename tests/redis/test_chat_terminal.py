"""``mixfleet chat`` as a person and as a script meet it: on a terminal and in a pipe."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixfleet import Client
from support.echo_worker import EchoWorker
from support.terminal import CTRL_C, CTRL_D, Terminal

CHAT = (sys.executable, "-m", "mixfleet", "chat", "--model", "tiny")
STOPPED = "[stopped]"

pytestmark = pytest.mark.slow  # each starts a Python of its own


@pytest.fixture
def environment(redis_url: str, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MIXFLEET_")}
    home = {"HOME": str(tmp_path), "MIXFLEET_DATA_DIR": str(tmp_path / "data")}
    return {**kept, **home, "MIXFLEET_REDIS": redis_url, "XDG_CONFIG_HOME": str(tmp_path)}


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url, model="tiny") as client:
        yield client


def pipe(
    environment: dict[str, str], *arguments: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CHAT, *arguments],
        env=environment,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_conversation_on_a_terminal(environment: dict[str, str], redis_url: str) -> None:
    with EchoWorker(redis_url), Terminal(CHAT, environment) as terminal:
        terminal.wait_for(">>>")
        terminal.press("Hello there\r")
        terminal.wait_for("\rHello there")
        terminal.wait_for(">>>")
        terminal.press("/stats\r")
        terminal.wait_for("1 + 11 tokens")
        terminal.wait_for(">>>")
        terminal.press("Again\r")
        terminal.wait_for("\rAgain")
        terminal.wait_for(">>>")
        terminal.press("/stats\r")
        terminal.wait_for("3 + 5 tokens")
        terminal.wait_for(">>>")
        terminal.press(CTRL_D)
        assert terminal.wait_for_exit() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(
    environment: dict[str, str], redis_url: str, client: Client
) -> None:
    with (
        EchoWorker(redis_url, hold_after=3) as worker,
        Terminal(CHAT, environment) as terminal,
    ):
        terminal.wait_for(">>>")
        terminal.press("abcdef\r")
        terminal.wait_for("\rabc")
        terminal.press(CTRL_C)
        terminal.wait_for(STOPPED)
        terminal.wait_for(">>>")
        worker.go.set()
        terminal.press("second\r")
        terminal.wait_for("\rsecond")
        terminal.wait_for(">>>")
        terminal.press(CTRL_C)
        terminal.wait_for("/bye leaves")
        terminal.wait_for(">>>")
        terminal.press("/bye\r")
        assert terminal.wait_for_exit() == 0
    assert len(worker.lost) == 1
    assert client.status(worker.lost[0]).state == "canceled"


def test_the_place_in_the_queue_is_shown_until_the_answer_begins(
    environment: dict[str, str], redis_url: str, client: Client
) -> None:
    before = client.chat("first", priority="interactive")
    with Terminal(CHAT, environment) as terminal:
        terminal.wait_for(">>>")
        terminal.press("mine\r")
        terminal.wait_for("no worker serves 'tiny' yet")
        terminal.wait_for("queued, position 2")
        before.cancel()
        terminal.wait_for("queued, position 1")
        with EchoWorker(redis_url):
            terminal.wait_for("\rmine")


def test_a_text_of_several_lines_on_a_terminal(environment: dict[str, str], redis_url: str) -> None:
    with EchoWorker(redis_url), Terminal(CHAT, environment) as terminal:
        terminal.wait_for(">>>")
        terminal.press('"""one\r')
        terminal.wait_for("...")
        terminal.press('two"""\r')
        terminal.wait_for("\rone\r\ntwo")


def test_one_question_in_a_pipe_gives_the_bare_answer(
    environment: dict[str, str], redis_url: str
) -> None:
    with EchoWorker(redis_url):
        done = pipe(environment, "-q", "Grüß dich", "--stats")
    assert (done.returncode, done.stdout) == (0, "Grüß dich\n")
    assert "1 + 9 tokens" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_piped_question_is_answered(environment: dict[str, str], redis_url: str) -> None:
    with EchoWorker(redis_url):
        done = pipe(environment, stdin="one\ntwo")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "")


def test_json_is_one_object_on_stdout(environment: dict[str, str], redis_url: str) -> None:
    with EchoWorker(redis_url):
        done = pipe(environment, "-q", "Hi", "--json")
    printed = json.loads(done.stdout)
    assert (printed["text"], printed["model"]) == ("Hi", "tiny")


def test_no_redis_is_one_line(environment: dict[str, str]) -> None:
    del environment["MIXFLEET_REDIS"]
    environment.pop("REDIS_URL", None)
    done = pipe(environment, "-q", "Hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "mixfleet up" in done.stderr


def test_ctrl_c_in_one_question_cancels_and_ends_with_130(
    environment: dict[str, str], redis_url: str, client: Client
) -> None:
    with EchoWorker(redis_url, hold_after=1) as worker:
        process = subprocess.Popen(
            [*CHAT, "-q", "abc"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"a"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (130, b"\n")
        assert b"Traceback" not in err
    assert client.status(worker.lost[0]).state == "canceled"


def test_a_reader_that_goes_away_ends_the_program_quietly(
    environment: dict[str, str], redis_url: str
) -> None:
    with EchoWorker(redis_url, hold_after=1) as worker:
        process = subprocess.Popen(
            [*CHAT, "-q", "abc"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"a"
            process.stdout.close()
            worker.go.set()
            assert process.stderr is not None
            err = process.stderr.read()
            assert process.wait(timeout=20) == 1
        assert b"Traceback" not in err
