"""Token ids of an answer, one by one, into the text to show.

Every class here is a pure function of what was pushed: whoever pushes the same ids again, one by
one, is in the same state. So the next worker continues an answer in mid-character. A token costs
time in proportion to its own text, however long the answer is.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mixfleet_engine.errors import InvalidRequestError
from mixfleet_engine.tokenizer import Tokenizer


class Detokenizer:
    """Turns token ids into whole characters.

    A token may end in the middle of a character, whose other bytes come with the next ones. Bytes
    that can no longer become a character are shown as U+FFFD, one that is still incomplete waits.

    Args:
        tokenizer: The model's.
        continues: The answer goes on in the middle of a text, whose last message is cut short, so
            that its first space counts. Otherwise that space is the one which sentencepiece models
            put before any text, and it is left out.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.adds_leading_space and not continues

    def push(self, token_id: int) -> str:
        """Return the characters that ``token_id`` completes, often one word, sometimes none."""
        new = self._tokenizer.token_bytes(token_id)
        if self._drops_space and new:
            new = new.removeprefix(b" ")
            self._drops_space = False
        return self._decoder.decode(new)

    def flush(self) -> str:
        """Return U+FFFD for a character that stayed incomplete, "" otherwise; call it once."""
        return self._decoder.decode(b"", final=True)


class StopStringFilter:
    """Shows text up to the first stop string, and never any part of that.

    Text that could still become a stop string is held back. Which stop string comes first is
    decided character by character, so it does not matter how the text is cut into pieces: the one
    that is complete first wins, the longest of those that are complete at the same character.

    Args:
        stops: The stop strings; none means that all text passes at once.

    Raises:
        InvalidRequestError: One of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise InvalidRequestError(f"stop string {list(stops).index('')} is empty")
        # Longest first, so that the first match is the longest.
        self._matchers = [_Matcher(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""
        self._stop_string: str | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that is complete; None while none is."""
        return self._stop_string

    def push(self, text: str) -> tuple[str, bool]:
        """Return what can be shown now, and whether a stop string is complete.

        After that nothing is shown any more, whatever is pushed.
        """
        if self._stop_string is not None:
            return "", True
        held_before, self._held = len(self._held), self._held + text
        for index, character in enumerate(text):
            stop = self._advance(character)
            if stop is not None:
                shown = self._held[: held_before + index + 1 - len(stop)]
                self._held, self._stop_string = "", stop
                return shown, True
        num_held = max((matcher.num_matched for matcher in self._matchers), default=0)
        boundary = len(self._held) - num_held
        shown, self._held = self._held[:boundary], self._held[boundary:]
        return shown, False

    def flush(self) -> str:
        """Return what was held back, now that no more text comes; call it once."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Take one character; return the stop string that it completes, if it does."""
        completed = None
        for matcher in self._matchers:
            if matcher.advance(character) and completed is None:
                completed = matcher.wanted
        return completed


class _Matcher:
    """Finds one string in a text that comes character by character (Knuth, Morris, Pratt).

    ``num_matched`` is the length of the longest beginning of the string that the text ends with.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self._fallbacks = _fallbacks(wanted)
        self.num_matched = 0

    def advance(self, character: str) -> bool:
        """Take one character; whether the text now ends with the whole string."""
        matched = self.num_matched
        while matched and self.wanted[matched] != character:
            matched = self._fallbacks[matched - 1]
        self.num_matched = matched + (self.wanted[matched] == character)
        return self.num_matched == len(self.wanted)


def _fallbacks(wanted: str) -> list[int]:
    """Return, per position i, the longest beginning that ``wanted[:i + 1]`` also ends with.

    For "abab" that is ``[0, 0, 1, 2]``; the whole string itself does not count.
    """
    fallbacks = [0] * len(wanted)
    matched = 0
    for index in range(1, len(wanted)):
        while matched and wanted[matched] != wanted[index]:
            matched = fallbacks[matched - 1]
        matched += wanted[matched] == wanted[index]
        fallbacks[index] = matched
    return fallbacks


AnswerPart = Literal["text", "tool_calls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPiece:
    """What one token adds to the shown answer."""

    text: str
    """Whole characters; empty while a character or a possible stop string is incomplete."""
    stopped: bool
    """A stop string is complete: the answer ends here."""
    part: AnswerPart = "text"
    """What ``text`` belongs to."""


class AnswerText:
    """The shown text of one answer: a :class:`Detokenizer` and a :class:`StopStringFilter`.

    Args:
        tokenizer: The model's.
        stops: The stop strings. They hold for the text of the answer, not for its tool calls.
        continues: See :class:`Detokenizer`; a chat format says it of a conversation.
        tool_calls_id: The control token that ends the text and begins the tool calls, which is
            itself the last token of the text. None: it is dropped as all others are.

    Raises:
        InvalidRequestError: A stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        *,
        continues: bool = False,
        tool_calls_id: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, continues=continues)
        self._filter = StopStringFilter(stops)
        self._tool_calls_id = tool_calls_id
        self.part: AnswerPart = "text"
        """What the next token belongs to."""

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._filter.stop_string

    def push(self, token_id: int) -> TextPiece:
        """Take the next token of the answer and return what it adds."""
        if self.part == "tool_calls":
            return TextPiece(text=self._detokenizer.push(token_id), stopped=False, part=self.part)
        if token_id == self._tool_calls_id:
            return self._end_text()
        text, stopped = self._filter.push(self._detokenizer.push(token_id))
        return TextPiece(text=text, stopped=stopped)

    def finish(self) -> str:
        """Return the rest of :attr:`part` that was held back; call it once, at the end.

        It is "" after a stop string.
        """
        if self.part == "tool_calls":
            return self._detokenizer.flush()
        text, stopped = self._filter.push(self._detokenizer.flush())
        return text if stopped else text + self._filter.flush()

    def _end_text(self) -> TextPiece:
        """Begin the tool calls; what was held back of the text can no longer be a stop string."""
        text, stopped = self._filter.push(self._detokenizer.flush())
        if not stopped:
            text += self._filter.flush()
            self._detokenizer = Detokenizer(self.tokenizer)
            self.part = "tool_calls"
        return TextPiece(text=text, stopped=stopped)
