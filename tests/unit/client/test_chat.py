import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from mixfleet import Client
from mixfleet.chat import chat, line_reader
from mixfleet.cli import ErrorLineGroup
from mixfleet_broker.errors import ConfigError
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    JobEvent,
)
from mixfleet_broker.settings import Settings
from support.fake_transport import answer, fleet


class Shell:
    """Runs ``mixfleet chat`` against a fake fleet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.transport, clock = fleet()
        self.clients: list[Client] = []

        def make_client(*, settings: Settings) -> Client:
            self.clients.append(Client(settings=settings, transport=self.transport, clock=clock))
            return self.clients[-1]

        monkeypatch.setattr("mixfleet.chat.Client", make_client)

    def chat(
        self,
        *arguments: str,
        stdin: str | bytes | None = None,
        answers: tuple[list[tuple[float, JobEvent]], ...] = (),
    ) -> Result:
        self.transport.answers = list(answers)
        group = ErrorLineGroup("mixfleet", {"chat": chat})
        return CliRunner().invoke(group, ["chat", *arguments], input=stdin)

    @property
    def sent(self) -> list[ChatJob]:
        return [kept.job for kept in self.transport.jobs.values()]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    for name in ("REDIS_URL", "MIXFLEET_REDIS", "MIXFLEET_MODEL", "MIXFLEET_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nonexistent")
    shell = Shell(monkeypatch)
    yield shell
    assert shell.transport.closed == bool(shell.clients)


def test_one_question_prints_the_answer_only(shell: Shell) -> None:
    result = shell.chat("-q", "Hi?", answers=(answer("Hel", "lo"),))
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello\n", "")


def test_a_question_may_come_through_a_pipe(shell: Shell) -> None:
    result = shell.chat(stdin="Hi\nthere?\n", answers=(answer("Hello"),))
    assert result.stdout == "Hello\n"
    assert shell.sent[0].messages[0].content == "Hi\nthere?\n"


def test_a_question_on_the_command_line_leaves_stdin_alone(shell: Shell) -> None:
    shell.chat("-q", "Hi", stdin="not this", answers=(answer("Hello"),))
    assert [message.content for message in shell.sent[0].messages] == ["Hi"]


@pytest.mark.parametrize("arguments", [("-q", " "), ()], ids=["option", "pipe"])
def test_an_empty_question_is_a_usage_error(shell: Shell, arguments: tuple[str, ...]) -> None:
    result = shell.chat(*arguments, stdin="\n")
    assert result.exit_code == 2
    assert "the question is empty" in result.stderr


def test_bytes_that_are_no_text_are_a_usage_error(shell: Shell) -> None:
    result = shell.chat(stdin=b"\xff\xfe")
    assert result.exit_code == 2
    assert "not utf-8 text" in result.stderr


def test_stats_go_to_stderr(shell: Shell) -> None:
    result = shell.chat("-q", "Hi", "--stats", answers=(answer("Hello"),))
    assert result.stdout == "Hello\n"
    assert "5 + 1 tokens" in result.stderr


def test_json_prints_one_object(shell: Shell) -> None:
    said = answer("Grüß", " dich")
    _, end = said[-1]
    assert isinstance(end, JobEnd)
    said[-1] = (0.0, replace(end, stop_string="!"))
    result = shell.chat("-q", "Hi", "--json", "--stop", "!", answers=(said,))
    printed = json.loads(result.stdout)
    assert printed["text"] == "Grüß dich"
    assert (printed["finish_reason"], printed["stop_string"]) == ("stop", "!")
    assert "logprobs" not in printed
    assert printed["usage"] == {"prompt_tokens": 5, "completion_tokens": 2}
    assert printed["job_id"] == shell.sent[0].job_id
    assert "Grüß" in result.stdout


def test_every_flag_reaches_the_job(shell: Shell) -> None:
    shell.chat(
        *("-q", "Hi", "--system", "S", "--model", "big", "--temperature", "0", "--top-k", "4"),
        *("--top-p", "0.5", "--max-tokens", "6", "--stop", "a", "--stop", "b", "--seed", "9"),
        *("--min-p", "0.1", "--repetition-penalty", "1.1"),
        *("--presence-penalty", "-0.5", "--frequency-penalty", "0"),
        answers=(answer("x"),),
    )
    (job,) = shell.sent
    assert [(turn.role, turn.content) for turn in job.messages] == [("system", "S"), ("user", "Hi")]
    assert job.model == "big"
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0, 4, 0.5)
    assert (sampling.max_tokens, sampling.stop, sampling.seed) == (6, ("a", "b"), 9)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-0.5, 0.0)


def test_a_failed_job_is_one_line_and_exit_code_1(shell: Shell) -> None:
    end = JobEnd(state="failed", code="engine_failed", message="boom")
    result = shell.chat("-q", "Hi", answers=([(0.1, end)],))
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: boom\n")


def test_several_models_are_listed_when_none_is_named(shell: Shell) -> None:
    shell.transport.served = ("big", "tiny")
    result = shell.chat("-q", "Hi")
    assert result.exit_code == 1
    assert "big, tiny" in result.stderr


def test_ctrl_c_in_a_single_question_cancels_the_job_and_ends_with_130(shell: Shell) -> None:
    shell.transport.interrupt_after = 2
    result = shell.chat("-q", "Hi", answers=(answer("a", "b", "c"),))
    assert result.exit_code == 130
    assert shell.transport.cancelled == [shell.sent[0].job_id]
    assert result.stdout == "a\n"


def test_a_terminal_gets_a_conversation_with_a_private_history(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mixfleet.chat.stdin_is_terminal", lambda: True)
    with (
        create_pipe_input() as keys,
        create_app_session(input=keys, output=DummyOutput()),
    ):
        keys.send_text("Hi\nAgain\n/bye\n")
        result = shell.chat(
            "--data-dir", str(tmp_path / "data"), answers=(answer("Hello"), answer("Yes"))
        )
    assert result.stdout == "Hello\nYes\n"
    assert result.stderr == "tiny listens. /help lists the commands, Ctrl-D leaves.\n"
    history = tmp_path / "data" / "chat_history"
    assert "+Again" in history.read_text("utf-8")
    assert history.stat().st_mode & 0o077 == 0


def test_a_conversation_needs_a_model_before_the_first_question(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixfleet.chat.stdin_is_terminal", lambda: True)
    shell.transport.served = ()
    result = shell.chat()
    assert result.exit_code == 1
    assert "no model is served" in result.stderr


def test_json_needs_a_question(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixfleet.chat.stdin_is_terminal", lambda: True)
    result = shell.chat("--json")
    assert result.exit_code == 2
    assert "--json needs a question" in result.stderr


def test_a_history_that_cannot_be_kept_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data_dir="):
        line_reader(tmp_path / "file" / "data")


def test_the_line_reader_passes_ctrl_c_and_ctrl_d_on(tmp_path: Path) -> None:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read_line = line_reader(tmp_path)
        keys.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            read_line(">>> ")
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read_line(">>> ")
