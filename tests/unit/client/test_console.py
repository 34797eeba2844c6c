import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixfleet import Client
from mixfleet.console import HELP, Console
from mixfleet.conversation import Conversation
from mixfleet.display import Display
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    JobEvent,
)
from mixfleet_broker.settings import Settings
from support.fake_transport import FakeTransport, answer, fleet

CTRL_C = KeyboardInterrupt()


class Session:
    """One run of the console over scripted lines."""

    def __init__(
        self,
        *lines: str | KeyboardInterrupt,
        answers: tuple[list[tuple[float, JobEvent]], ...] = (),
        interrupt_after: int | None = None,
        shows_stats: bool = False,
    ) -> None:
        self.transport: FakeTransport
        self.transport, clock = fleet(*answers)
        self.transport.interrupt_after = interrupt_after
        self.prompts: list[str] = []
        self.conversation = Conversation()
        self._lines: Iterator[str | KeyboardInterrupt] = iter(lines)
        out, err = io.StringIO(), io.StringIO()
        client = Client(settings=Settings(), transport=self.transport, clock=clock)
        display = Display(out, err)
        Console(
            client, "tiny", self.conversation, display, self._read_line, shows_stats=shows_stats
        ).run()
        self.out, self.err = out.getvalue(), err.getvalue()

    def _read_line(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        if isinstance(line, KeyboardInterrupt):
            raise line
        return line

    @property
    def sent(self) -> list[ChatJob]:
        return [kept.job for kept in self.transport.jobs.values()]

    def sent_texts(self, number: int) -> list[str]:
        return [message.content for message in self.sent[number].messages]


def test_a_chat_of_two_turns_sends_the_first_along() -> None:
    session = Session("Hi", "And you?", answers=(answer("Hel", "lo"), answer("Fine")))
    assert session.out == "Hello\nFine\n"
    assert session.sent_texts(0) == ["Hi"]
    assert session.sent_texts(1) == ["Hi", "Hello", "And you?"]


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit"])
def test_leaving_stops_reading(line: str) -> None:
    session = Session(line, "never asked")
    assert session.sent == []
    assert len(session.prompts) == 1


def test_the_end_of_input_leaves() -> None:
    assert Session().prompts == [">>> "]


def test_empty_lines_ask_nothing() -> None:
    assert Session("", "   ").sent == []


def test_ctrl_c_at_the_prompt_hints_how_to_leave() -> None:
    session = Session(CTRL_C, "Hi", answers=(answer("Hello"),))
    assert "Ctrl-D or /bye" in session.err
    assert session.out == "Hello\n"


def test_quotes_begin_and_end_a_text_of_several_lines() -> None:
    session = Session('"""first', "second", 'third"""', answers=(answer("ok"),))
    assert session.sent_texts(0) == ["first\nsecond\nthird"]
    assert session.prompts[:3] == [">>> ", "... ", "... "]


def test_quotes_on_one_line_are_one_line() -> None:
    session = Session('"""all here"""', answers=(answer("ok"),))
    assert session.sent_texts(0) == ["all here"]


def test_ctrl_c_inside_quotes_drops_the_text() -> None:
    session = Session('"""first', CTRL_C, "Hi", answers=(answer("ok"),))
    assert session.sent_texts(0) == ["Hi"]


def test_ctrl_c_in_an_answer_cancels_it_and_the_chat_goes_on() -> None:
    session = Session(
        "Count", "Why?", answers=(answer("one ", "two ", "three"), answer("So.")), interrupt_after=3
    )
    assert session.out == "one two \nSo.\n"
    assert "[stopped]" in session.err
    assert session.transport.cancelled == [session.sent[0].job_id]
    assert session.sent_texts(1) == ["Count", "one two ", "Why?"]


def test_ctrl_c_before_the_first_token_leaves_no_trace() -> None:
    session = Session("Slow", "Hi", answers=(answer("x"), answer("Hello")), interrupt_after=0)
    assert session.sent_texts(1) == ["Hi"]
    assert session.out == "Hello\n"


def test_a_failed_question_is_one_line_and_the_chat_goes_on() -> None:
    failed: list[tuple[float, JobEvent]] = [
        (0.1, JobEnd(state="failed", code="prompt_too_long", message="900 tokens exceed 800"))
    ]
    session = Session("long", "short", answers=(failed, answer("ok")))
    assert "error: 900 tokens exceed 800\n" in session.err
    assert session.sent_texts(1) == ["short"]


def test_help_lists_all_commands() -> None:
    session = Session("/help", "/?")
    assert session.err.count(HELP) == 2
    for command in ("/system", "/set", "/regen", "/save", "/load", "/stats", "/clear", "/bye"):
        assert command in HELP


def test_an_unknown_command_is_not_sent_to_the_model() -> None:
    session = Session("/sytem Be brief")
    assert "no command /sytem" in session.err
    assert session.sent == []


def test_a_path_is_a_question_not_a_command() -> None:
    session = Session("/etc/passwd is what?", answers=(answer("A file."),))
    assert session.sent_texts(0) == ["/etc/passwd is what?"]


def test_system_sets_and_removes_the_instruction() -> None:
    session = Session("/system Be brief.", "a", "/system", "b", answers=(answer("x"), answer("y")))
    assert session.sent_texts(0) == ["Be brief.", "a"]
    assert session.sent_texts(1) == ["a", "x", "b"]


def test_set_changes_the_next_answer_and_shows_all_settings() -> None:
    session = Session("/set temperature 0", "/set max_tokens 5", "a", answers=(answer("x"),))
    assert session.sent[0].sampling.temperature == 0
    assert session.sent[0].sampling.max_tokens == 5
    assert "temperature        0.0\n" in session.err


def test_a_wrong_setting_is_one_line() -> None:
    assert "error: temperature=hot: " in Session("/set temperature hot").err


def test_regen_replaces_the_last_answer() -> None:
    session = Session("a", "/regen", "b", answers=(answer("x"), answer("y"), answer("z")))
    assert session.sent_texts(1) == ["a"]
    assert session.sent_texts(2) == ["a", "y", "b"]


def test_regen_after_a_failure_asks_again_and_keeps_the_turns_before() -> None:
    failed: list[tuple[float, JobEvent]] = [(0.1, JobEnd(state="failed", code="engine_failed"))]
    session = Session("a", "b", "/regen", answers=(answer("x"), failed, answer("y")))
    assert session.sent_texts(2) == ["a", "x", "b"]


def test_regen_without_a_question_says_so() -> None:
    session = Session("/regen")
    assert session.sent == []
    assert "nothing to answer again" in session.err


def test_clear_begins_anew_and_keeps_the_system_text() -> None:
    session = Session("/system S", "a", "/clear", "/regen", "b", answers=(answer("x"), answer("y")))
    assert session.sent_texts(1) == ["S", "b"]


def test_save_and_load_bring_a_conversation_back(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    Session("/system S", "a", f"/save {file}", answers=(answer("x"),))
    session = Session(f"/load {file}", "b", answers=(answer("y"),))
    assert session.sent_texts(0) == ["S", "a", "x", "b"]
    session = Session(f"/load {file}", "/regen", answers=(answer("y"),))
    assert session.sent_texts(0) == ["S", "a"]


@pytest.mark.parametrize("command", ["/save", "/load", "/load /no/such/file"])
def test_a_file_that_cannot_be_used_is_one_line(command: str) -> None:
    session = Session(command)
    assert session.err.startswith("error: ")
    assert session.err.count("\n") == 1


def test_stats_say_what_the_last_answer_took() -> None:
    session = Session("/stats", "a", "/stats", answers=(answer("x", "y"),))
    assert session.err.startswith("no answer yet\n")
    assert "5 + 2 tokens" in session.err


def test_stats_come_by_themselves_when_asked_for() -> None:
    assert "5 + 1 tokens" in Session("a", answers=(answer("x"),), shows_stats=True).err


def test_answers_and_notes_go_to_different_streams() -> None:
    session = Session("/help", "a", "/stats", answers=(answer("x"),))
    assert session.out == "x\n"


@pytest.mark.parametrize("command", ["/clear now?", "/bye"])
def test_quoted_text_is_never_a_command(command: str) -> None:
    session = Session(f'"""{command}"""', answers=(answer("ok"),))
    assert session.sent[0].messages[-1].content == command
