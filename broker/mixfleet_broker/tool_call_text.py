"""The tool calls in an answer, read from the JSON that the model writes, as it comes.

The text is the ``tool_calls`` part of the answer's chunks: ``[{"name": "f", "arguments": {...}},
...]``, keys in any order, others among them. Models write what they like, and an answer may end in
the middle: nothing here raises, and how the text is cut into pieces makes no difference.
"""

import json
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from mixfleet_broker.messages import ToolCall

_LETTERS: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SPACES: Final = " \t\n\r"
_NEXT: Final = {
    "list": {"[": "first call"},
    "first call": {"{": "first key", "]": "end"},
    "call": {"{": "first key"},
    "first key": {'"': "colon", "}": "after call"},
    "key": {'"': "colon"},
    "colon": {":": "value"},
    "after value": {",": "key", "}": "after call"},
    "after call": {",": "call", "]": "end"},
    "end": {},
}
"""What may come where, between values, and what is awaited after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStarted:
    """A call whose name is known; its arguments follow."""

    index: int
    """0 for the first call of the answer."""
    call_id: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentsPiece:
    """The next piece of a call's arguments, as the model wrote it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFinished:
    """A call is whole: the pieces of its arguments together are a JSON object."""

    index: int


ToolCallEvent = CallStarted | ArgumentsPiece | CallFinished


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedToolCalls:
    """What was read of an answer's tool calls."""

    calls: tuple[ToolCall, ...]
    """The whole ones."""
    unfinished: ToolCall | None = None
    """The call in whose middle the text ends or goes wrong; its arguments are no JSON."""
    problem: str | None = None
    """Why there may be more than was read; None if the text is whole and well-formed."""


def tool_call_id(job_id: str, index: int) -> str:
    """Return the id of an answer's call: nine letters and digits, the same for every reader."""
    value = int.from_bytes(sha256(f"{job_id}:{index}".encode()).digest(), "big")
    letters = []
    for _ in range(9):
        value, letter = divmod(value, len(_LETTERS))
        letters.append(_LETTERS[letter])
    return "".join(letters)


def parse_tool_calls(job_id: str, text: str) -> ParsedToolCalls:
    """Return the calls in the whole ``tool_calls`` part of a job's answer."""
    parser = ToolCallParser(job_id)
    parser.push(text)
    return parser.parsed()


@dataclass(slots=True)
class _Call:
    index: int
    name: str | None = None
    arguments: list[str] = field(default_factory=list)
    num_reported: int = -1
    """How many of ``arguments`` events have told; -1: not even the name."""


class ToolCallParser:
    """Reads the tool calls of one answer piece by piece.

    Args:
        job_id: Of the job, from which the calls' ids are made.
    """

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._awaited = "list"
        self._value: _Value | None = None
        self._key = ""
        self._seen: set[str] = set()
        self._call: _Call | None = None
        self._calls: list[ToolCall] = []
        self._events: list[ToolCallEvent] = []
        self._num_characters = 0
        self._problem: str | None = None

    def push(self, text: str) -> list[ToolCallEvent]:
        """Take the next piece of text; return what it tells."""
        for character in text:
            if self._problem is not None:
                break
            self._num_characters += 1
            self._take(character)
        self._report()
        events, self._events = self._events, []
        return events

    def parsed(self) -> ParsedToolCalls:
        """Return the calls so far; after the last piece this is the result."""
        problem = self._problem
        if problem is None and self._awaited != "end":
            problem = f"the list of calls is cut off after {self._num_characters} characters"
        call = self._call
        has_begun = call is not None and call.name is not None
        return ParsedToolCalls(
            calls=tuple(self._calls),
            unfinished=self._tool_call(call) if call is not None and has_begun else None,
            problem=problem,
        )

    def _take(self, character: str) -> None:
        if self._value is not None:
            self._read(self._value, character)
        elif character in _SPACES:
            pass
        elif self._awaited == "value":
            self._begin_value(character)
        elif character in _NEXT[self._awaited]:
            self._awaited = _NEXT[self._awaited][character]
            self._obey(character)
        else:
            self._fail(f"not what comes at {self._awaited!r}")

    def _obey(self, mark: str) -> None:
        if mark == "{":
            self._call, self._seen = _Call(index=len(self._calls)), set()
        elif mark == '"':
            self._value = _Value(mark)
        elif mark == "}":
            self._end_call()

    def _begin_value(self, character: str) -> None:
        if self._key in self._seen:
            return self._fail(f"a second {self._key}")
        if self._key in ("name", "arguments"):
            self._seen.add(self._key)
        if self._key == "arguments" and character != "{":
            return self._fail("arguments that are no object")
        self._value = _Value(character)
        self._awaited = "after value"
        return self._keep(character)

    def _read(self, value: "_Value", character: str) -> None:
        if value.ends_before(character):
            self._end_value(value)
            if self._problem is None:
                self._take(character)
            return
        if self._awaited == "after value":
            self._keep(character)
        if value.take(character):
            self._end_value(value)

    def _keep(self, character: str) -> None:
        if self._key == "arguments" and self._call is not None:
            self._call.arguments.append(character)

    def _end_value(self, value: "_Value") -> None:
        self._value = None
        try:
            found: Any = json.loads(value.text)
            value.text.encode()
        except (ValueError, RecursionError):
            return self._fail("a value that is no JSON")
        if self._awaited == "colon":
            self._key = found
        elif self._key == "name":
            self._take_name(found)
        return None

    def _take_name(self, name: object) -> None:
        if not isinstance(name, str) or not name or not _is_text(name):
            self._fail("a name that is no text")
        elif self._call is not None:
            self._call.name = name

    def _end_call(self) -> None:
        call = self._call
        if call is None or call.name is None:
            return self._fail("a call without a name")
        # Readers parse what they get, and a tool without parameters is often called like this.
        call.arguments = call.arguments or ["{}"]
        self._report()
        self._events.append(CallFinished(index=call.index))
        self._calls.append(self._tool_call(call))
        self._call = None
        return None

    def _report(self) -> None:
        """Tell what is new of the call that is being read, once its name is known."""
        call = self._call
        if call is None or call.name is None:
            return
        if call.num_reported < 0:
            call_id = tool_call_id(self._job_id, call.index)
            self._events.append(CallStarted(index=call.index, call_id=call_id, name=call.name))
            call.num_reported = 0
        new = call.arguments[call.num_reported :]
        if new:
            self._events.append(ArgumentsPiece(index=call.index, text="".join(new)))
            call.num_reported += len(new)

    def _tool_call(self, call: _Call) -> ToolCall:
        return ToolCall(
            call_id=tool_call_id(self._job_id, call.index),
            name=call.name or "",
            arguments="".join(call.arguments),
        )

    def _fail(self, what: str) -> None:
        self._problem = f"{what}, at character {self._num_characters} of the list of calls"


class _Value:
    """One JSON value that is being read; finds its end, and leaves what is in it to ``json``."""

    def __init__(self, first: str) -> None:
        self._characters: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escapes = False
        self._is_word = first not in '{["'
        self.take(first)

    @property
    def text(self) -> str:
        return "".join(self._characters)

    def ends_before(self, character: str) -> bool:
        """Whether ``character`` ends a number or a word, which it is no part of."""
        return self._is_word and character in f",]}}{_SPACES}"

    def take(self, character: str) -> bool:
        """Take one more character; whether the value is complete with it."""
        self._characters.append(character)
        if self._escapes:
            self._escapes = False
            return False
        if self._in_string:
            self._escapes = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return not (self._in_string or self._is_word or self._depth)


def _is_text(value: str) -> bool:
    """Whether ``value`` can be written as UTF-8; an escaped half of a pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
