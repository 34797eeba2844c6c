"""A local conversation on a terminal: lines in, tokens out as they come."""

from collections.abc import Callable
from typing import TextIO

from mixfleet_engine.errors import EngineError
from mixfleet_engine.local_chat import AnswerStats, LocalChat

HELP = "/system TEXT sets the instruction, /clear starts anew, /stats says what an answer took"
# A model may write anything; on a terminal a control character would be a command to it.
_CONTROLS = [code for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"]
_VISIBLE = dict.fromkeys(_CONTROLS, "\N{REPLACEMENT CHARACTER}")


class TerminalChat:
    """Reads questions, writes answers token by token.

    Args:
        chat: The conversation.
        answers: Where answers go.
        notes: Where all else goes.
        shows_stats: Whether to say after each answer what it took.
    """

    def __init__(
        self, chat: LocalChat, answers: TextIO, notes: TextIO, *, shows_stats: bool = False
    ) -> None:
        self._chat = chat
        self._answers = answers
        self._notes = notes
        self._shows_stats = shows_stats

    def run(self, read_line: Callable[[str], str]) -> None:
        """Chat until the user leaves."""
        self._note(f"{HELP};\n/bye or Ctrl-D leaves, Ctrl-C stops an answer")
        while True:
            try:
                text = read_line(">>> ").strip()
            except KeyboardInterrupt:
                self._note("")
                continue
            except EOFError:
                return
            if text == "/bye":
                return
            if text:
                self._handle(text)

    def _handle(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name == "/clear":
            self._chat.clear()
        elif name == "/system":
            self._chat.set_system_prompt(rest.strip())
        elif name == "/stats":
            self._shows_stats = not self._shows_stats
        elif name.startswith("/") and "/" not in name[1:]:
            self._note(HELP)
        else:
            try:
                self.answer(text)
            except EngineError as error:
                self._note(f"error: {error}")

    def answer(self, question: str) -> None:
        """Ask and write the answer as it comes; Ctrl-C ends it there."""
        pieces = self._chat.ask(question)
        try:
            for piece in pieces:
                self._answers.write(piece.translate(_VISIBLE))
                self._answers.flush()
        except KeyboardInterrupt:
            pieces.close()
            self._note("\n[stopped]")
        self._answers.write("\n")
        self._answers.flush()
        if self._shows_stats and self._chat.last_stats is not None:
            self._note(stats_line(self._chat.last_stats))

    def _note(self, text: str) -> None:
        self._notes.write(text + "\n")
        self._notes.flush()


def stats_line(stats: AnswerStats) -> str:
    """Return what an answer took, in one line."""
    return (
        f"[{stats.prompt_tokens} + {stats.completion_tokens} tokens · "
        f"first token {1000 * stats.first_token_s:.0f} ms · "
        f"{stats.tokens_per_s:.1f} tokens/s · total {stats.total_s:.1f} s]"
    )
