import io

import pytest

from mixfleet_engine.chat_format import chat_format
from mixfleet_engine.conversation import Message
from mixfleet_engine.errors import AnswerFailedError, PromptTooLongError
from mixfleet_engine.local_chat import LocalChat
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.terminal_chat import TerminalChat, stats_line
from support.byte_tokenizer import ByteTokenizer
from support.scripted_engine import ScriptedEngine

TOKENIZER = ByteTokenizer()
CHATML = chat_format("chatml", TOKENIZER)
EOS = TOKENIZER.eos_id
assert EOS is not None


def chat_with(engine: ScriptedEngine, *, plain: bool = False, system: str = "") -> LocalChat:
    return LocalChat(
        engine,
        TOKENIZER,
        None if plain else CHATML,
        sampling=SamplingParams(seed=7),
        system_prompt=system,
    )


def answer(text: str) -> list[int]:
    assert EOS is not None
    return [*text.encode(), EOS]


def last_prompt(engine: ScriptedEngine) -> list[int]:
    return list(engine.requests[-1].prompt_token_ids)


def test_an_answer_comes_token_by_token_and_is_part_of_the_next_prompt() -> None:
    engine = ScriptedEngine([answer("Hi"), answer("Fine")])
    chat = chat_with(engine, system="Be kind.")
    assert [piece for piece in chat.ask("Hello?") if piece] == ["H", "i"]
    assert "".join(chat.ask("How are you?")) == "Fine"
    turns = [("system", "Be kind."), ("user", "Hello?"), ("assistant", "Hi")]
    turns.append(("user", "How are you?"))
    messages = [Message(role=role, content=content) for role, content in turns]
    assert last_prompt(engine) == CHATML.encode(messages)


def test_each_answer_has_a_seed_of_its_own() -> None:
    engine = ScriptedEngine([answer("a"), answer("b")])
    chat = chat_with(engine)
    for question in ("one", "two"):
        list(chat.ask(question))
    assert [request.sampling.seed for request in engine.requests] == [7, 8]


def test_no_token_at_all_is_a_length_like_any_other() -> None:
    engine = ScriptedEngine([answer("a")])
    chat = LocalChat(engine, TOKENIZER, CHATML, sampling=SamplingParams(), max_tokens=0)
    list(chat.ask("?"))
    assert engine.requests[0].max_tokens == 0, "the engine itself refuses it"


def test_a_plain_text_grows_without_any_format() -> None:
    engine = ScriptedEngine([answer(" upon a time"), answer(" a king")])
    chat = chat_with(engine, plain=True)
    assert "".join(chat.ask("Once")) == " upon a time"
    list(chat.ask(" there was"))
    assert last_prompt(engine) == [TOKENIZER.bos_id, *b"Once upon a time there was"]


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    pieces = list(chat_with(ScriptedEngine([answer("ü!")])).ask("?"))
    assert [piece for piece in pieces if piece] == ["ü", "!"]


def test_leaving_early_frees_the_engine_and_keeps_what_was_said() -> None:
    engine = ScriptedEngine([answer("abc"), answer("d")])
    chat = chat_with(engine)
    pieces = chat.ask("?")
    assert next(pieces) == "a"
    pieces.close()
    assert engine.aborted == ["chat"]
    assert chat.last_stats is not None
    assert chat.last_stats.finish_reason is None
    list(chat.ask("and?"))
    assert b"a" in bytes(i for i in last_prompt(engine) if i < 256).split(b"assistant\n")[1]


def test_a_question_that_does_not_fit_is_forgotten() -> None:
    engine = ScriptedEngine([answer("ok")], context_length=60)
    chat = chat_with(engine)
    with pytest.raises(PromptTooLongError, match="exceeds the context of 60"):
        list(chat.ask("x" * 60))
    assert "".join(chat.ask("y")) == "ok"
    assert ord("x") not in last_prompt(engine)[20:]


def test_numbers_that_are_not_finite_are_an_error() -> None:
    chat = chat_with(ScriptedEngine([b"ab"], ["error"]))
    with pytest.raises(AnswerFailedError):
        list(chat.ask("?"))


def test_clear_keeps_the_instruction_and_forgets_the_rest() -> None:
    engine = ScriptedEngine([answer("a"), answer("b")])
    chat = chat_with(engine, system="Be kind.")
    list(chat.ask("one"))
    chat.clear()
    list(chat.ask("two"))
    expected = [Message(role="system", content="Be kind."), Message(role="user", content="two")]
    assert last_prompt(engine) == CHATML.encode(expected)


class Terminal:
    """Lines typed in advance, and what was written."""

    def __init__(self, engine: ScriptedEngine, *lines: str | type[BaseException]) -> None:
        self.answers, self.notes = io.StringIO(), io.StringIO()
        self._lines = list(lines)
        self.prompts: list[str] = []
        TerminalChat(chat_with(engine), self.answers, self.notes).run(self._read)

    def _read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if isinstance(line, str):
            return line
        raise line


def test_the_terminal_answers_until_the_user_leaves() -> None:
    terminal = Terminal(ScriptedEngine([answer("one"), answer("two")]), "1?", "", "2?", "/bye", "3")
    assert terminal.answers.getvalue() == "one\ntwo\n"
    assert len(terminal.prompts) == 4


def test_control_characters_of_the_model_are_no_commands_to_the_terminal() -> None:
    terminal = Terminal(ScriptedEngine([answer("a\x1b[2Jb\x07\n\tc")]), "?")
    assert terminal.answers.getvalue() == "a\ufffd[2Jb\ufffd\n\tc\n"


def test_ctrl_c_at_the_prompt_goes_on_and_errors_are_one_line() -> None:
    engine = ScriptedEngine([answer("ok")], context_length=60)
    terminal = Terminal(engine, KeyboardInterrupt, "x" * 100, "y")
    assert terminal.answers.getvalue() == "ok\n"
    assert "error: " in terminal.notes.getvalue()


def test_commands_change_the_conversation_and_unknown_ones_show_the_help() -> None:
    engine = ScriptedEngine([answer("a"), answer("b")])
    terminal = Terminal(engine, "one", "/system Be brief.", "two", "/what", "/stats")
    expected = [Message(role="system", content="Be brief."), Message(role="user", content="two")]
    assert last_prompt(engine) == CHATML.encode(expected)
    assert terminal.notes.getvalue().count("/clear starts anew") == 2


def test_the_stats_line_names_both_lengths_and_the_speed() -> None:
    chat = chat_with(ScriptedEngine([answer("abc")]))
    list(chat.ask("?"))
    assert chat.last_stats is not None
    line = stats_line(chat.last_stats)
    assert f"{chat.last_stats.prompt_tokens} + 4 tokens" in line
    assert "tokens/s" in line
