"""The interactive chat: reads lines, answers slash commands, shows answers as they come."""

from collections.abc import Callable
from pathlib import Path

from mixfleet.conversation import SETTING_NAMES, Conversation
from mixfleet.display import Display, stats_line
from mixfleet.fleet import Client
from mixfleet.stream import ChatResult
from mixfleet_broker.errors import ConfigError, MixfleetError

PROMPT = ">>> "
MORE_PROMPT = "... "
QUOTES = '"""'

HELP = f"""\
/help              this list
/system TEXT       set the instruction put before the conversation; no TEXT removes it
/set NAME VALUE    change a setting: {", ".join(SETTING_NAMES)}; no NAME shows them
/regen             answer the last question again
/save FILE         write the conversation to a file
/load FILE         read it back
/stats             what the last answer took
/clear             begin a new conversation
/bye               leave (so does Ctrl-D)
{QUOTES}                begins and ends a text of several lines
Ctrl-C             stops an answer"""


class Console:
    """One interactive chat.

    Args:
        client: The fleet to ask.
        model: The model to ask.
        conversation: Where the chat begins.
        display: Where it is shown.
        read_line: Asks for one line with the given prompt; raises EOFError at the end of input
            and KeyboardInterrupt on Ctrl-C.
        shows_stats: Whether each answer is followed by what it took.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        conversation: Conversation,
        display: Display,
        read_line: Callable[[str], str],
        *,
        shows_stats: bool = False,
    ) -> None:
        self._client = client
        self._model = model
        self._conversation = conversation
        self._display = display
        self._read_line = read_line
        self._shows_stats = shows_stats
        self._last_question: str | None = None
        self._last_was_noted = False
        self._last_result: ChatResult | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/?": self._help,
            "/system": self._system,
            "/set": self._set,
            "/regen": self._regen,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/clear": self._clear,
        }

    def run(self) -> None:
        """Chat until the user leaves."""
        while True:
            try:
                text, is_quoted = self._read_text()
            except KeyboardInterrupt:
                self._display.note("Ctrl-D or /bye leaves, /help lists the commands")
                continue
            except EOFError:
                return
            if text in ("/bye", "/exit", "/quit") and not is_quoted:
                return
            if text:
                self._handle(text, is_quoted=is_quoted)

    def _read_text(self) -> tuple[str, bool]:
        """Return what was typed, and whether in quotes, which no command is."""
        line = self._read_line(PROMPT)
        if not line.lstrip().startswith(QUOTES):
            return line.strip(), False
        text = line.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + self._read_line(MORE_PROMPT)
        return text.rstrip().removesuffix(QUOTES).strip(), True

    def _handle(self, text: str, *, is_quoted: bool) -> None:
        """Run a command or ask a question; a failure is one line and the chat goes on."""
        name, _, rest = text.partition(" ")
        try:
            if is_quoted:
                self._ask(text)
            elif name in self._commands:
                self._commands[name](rest.strip())
            elif name.startswith("/") and "/" not in name[1:]:
                self._display.note(f"no command {name}; /help lists them")
            else:
                self._ask(text)
        except KeyboardInterrupt:
            self._display.note("[stopped]")
        except MixfleetError as error:
            self._display.note(f"error: {error}")

    def _ask(self, question: str) -> None:
        self._last_question, self._last_was_noted = question, False
        self._last_result = None
        sampling = self._conversation.settings()
        messages = self._conversation.asking(question)
        # Leaving the block in mid-answer, as Ctrl-C does, cancels the job.
        with self._client.chat(
            messages,
            model=self._model,
            priority="interactive",
            on_disconnect="cancel",
            **sampling,
        ) as stream:
            try:
                workers = self._client.num_workers(stream.model)
                self._last_result = self._display.answer(stream, num_workers=workers)
            finally:
                # What was shown of a stopped answer is part of the conversation.
                self._last_was_noted = self._conversation.note(question, stream.text)
        if self._shows_stats:
            self._stats("")

    def _help(self, _: str) -> None:
        self._display.note(HELP)

    def _system(self, text: str) -> None:
        self._conversation.system = text or None
        self._display.note("system text set" if text else "no system text")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name:
            self._conversation.set(name, value.strip())
        width = max(map(len, SETTING_NAMES))
        for setting, current in self._conversation.settings().items():
            self._display.note(f"{setting:<{width}} {current}")

    def _regen(self, _: str) -> None:
        if self._last_question is None:
            self._display.note("nothing to answer again")
            return
        if self._last_was_noted:
            self._conversation.take_back()
        self._ask(self._last_question)

    def _save(self, text: str) -> None:
        self._conversation.save(_file(text))
        self._display.note(f"{len(self._conversation.turns)} turns saved to {text}")

    def _load(self, text: str) -> None:
        self._conversation = Conversation.load(_file(text))
        questions = [turn.content for turn in self._conversation.turns if turn.role == "user"]
        self._last_question = questions[-1] if questions else None
        self._last_was_noted = bool(questions)
        self._display.note(f"{len(self._conversation.turns)} turns loaded from {text}")

    def _stats(self, _: str) -> None:
        result = self._last_result
        self._display.note("no answer yet" if result is None else stats_line(result))

    def _clear(self, _: str) -> None:
        self._conversation.turns.clear()
        self._last_question, self._last_was_noted = None, False
        self._display.note("new conversation")


def _file(text: str) -> Path:
    if not text:
        raise ConfigError("name a file")
    return Path(text).expanduser()
