"""Log-probabilities as OpenAI's older completions have them: lists side by side."""

import codecs
from collections.abc import Sequence
from typing import Any

from mixfleet_broker.messages import TokenLogprob


class LogprobLists:
    """Makes the lists of one choice, piece by piece; offsets count on from piece to piece."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def take(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Sequence[Any]]:
        """Return the lists of the tokens that come next."""
        return {
            "tokens": [token_text(entry.token) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [_top(entry) for entry in logprobs],
            "text_offset": [self._take_offset(entry.token) for entry in logprobs],
        }

    def _take_offset(self, token: bytes) -> int:
        """Return where the token begins in the answer, in characters.

        ``é`` of two tokens and then ``a``: 0, 0, 1. The first half alone and then ``a``: 0, 1, as
        the text has a replacement character for it.
        """
        offset = self._offset
        is_broken_off = self._decoder.getstate()[0] and token and not _continues(token[0])
        self._offset += len(self._decoder.decode(token))
        return offset + 1 if is_broken_off else offset


def _continues(byte: int) -> bool:
    """Whether a byte of UTF-8 goes on with a character that others have begun."""
    return 0x80 <= byte < 0xC0


def token_text(token: bytes) -> str:
    r"""Return a token as text; a part of a character as OpenAI writes it, ``bytes:\xc3``."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _top(entry: TokenLogprob) -> dict[str, float]:
    """Return the most likely tokens and the chosen one, which OpenAI always adds."""
    top = {token_text(token): logprob for token, logprob in entry.top}
    return {**top, token_text(entry.token): entry.logprob}
