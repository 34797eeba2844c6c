"""The tokenizer of a simulated engine without a checkpoint: bytes for questions, words for answers.

It needs no library and no file, so that a fleet can be tried where nothing but the base install
is there.
"""

from collections.abc import Sequence

WORDS = (
    "a", "and", "answer", "as", "batch", "but", "by", "each", "fast", "fleet", "for", "from", "in",
    "is", "it", "its", "job", "model", "next", "no", "not", "of", "one", "only", "queue", "shows",
    "simulated", "some", "step", "stream", "text", "that", "the", "this", "to", "token", "with",
    "word", "worker",
)  # fmt: skip
CONTROLS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

_NUM_BYTES = 256


class SimulatedWords:
    """Implements :class:`~mixfleet_engine.tokenizer.Tokenizer`.

    Tokens 0 to 255 are bytes, then come the words, each with a space before it, then the control
    tokens of ChatML.
    """

    adds_leading_space = False
    chat_template = None

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self._words = [f" {word}".encode() for word in words]
        first = _NUM_BYTES + len(words)
        self._controls = {name: first + i for i, name in enumerate(CONTROLS)}

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return _NUM_BYTES + len(self._words) + len(self._controls)

    @property
    def bos_id(self) -> int:
        """The token that begins a prompt."""
        return self._controls["<s>"]

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return self._controls["</s>"]

    @property
    def control_ids(self) -> frozenset[int]:
        """All control tokens."""
        return frozenset(self._controls.values())

    @property
    def word_ids(self) -> range:
        """The tokens of which answers are made."""
        return range(_NUM_BYTES, _NUM_BYTES + len(self._words))

    def encode(self, text: str) -> list[int]:
        """Return the bytes of ``text``; half of a surrogate pair becomes a question mark."""
        return list(text.encode(errors="replace"))

    def encode_space(self) -> list[int]:
        """Return the token of one space."""
        return [ord(" ")]

    def control_id(self, name: str) -> int | None:
        """Return the id of a control token."""
        return self._controls.get(name)

    def id_to_piece(self, token_id: int) -> str:
        """Return how the token is spelled."""
        if token_id < _NUM_BYTES:
            return f"<0x{token_id:02X}>"
        if token_id in self.word_ids:
            return self._words[token_id - _NUM_BYTES].decode().replace(" ", "▁")
        return CONTROLS[token_id - self.word_ids.stop]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the token's text; control tokens have none."""
        if token_id < _NUM_BYTES:
            return bytes([token_id])
        return self._words[token_id - _NUM_BYTES] if token_id in self.word_ids else b""
