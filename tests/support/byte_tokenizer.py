"""A tokenizer without a vocabulary file: one token per byte, control tokens above them."""

from mixfleet_engine.tokenizer import check_text

CONTROL_NAMES = ("<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>")
TOOL_NAMES = (
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
FIRST_CONTROL_ID = 256


class ByteTokenizer:
    """Implements `mixfleet_engine.tokenizer.Tokenizer`; ids 0..255 are the bytes themselves.

    ``chat_template`` and ``adds_leading_space`` are whatever a test wants them to be, and so is
    whether it has Mistral's control tokens for tools.
    """

    def __init__(
        self,
        *,
        chat_template: str | None = None,
        adds_leading_space: bool = False,
        adds_tool_tokens: bool = False,
    ) -> None:
        added = TOOL_NAMES if adds_tool_tokens else ()
        self._names: tuple[str, ...] = (*CONTROL_NAMES, *added)
        self._ids = {name: FIRST_CONTROL_ID + i for i, name in enumerate(self._names)}
        self._chat_template = chat_template
        self._adds_leading_space = adds_leading_space

    @property
    def vocab_size(self) -> int:
        return FIRST_CONTROL_ID + len(self._names)

    @property
    def bos_id(self) -> int | None:
        return self._ids["<s>"]

    @property
    def eos_id(self) -> int | None:
        return self._ids["</s>"]

    @property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self._ids.values())

    @property
    def adds_leading_space(self) -> bool:
        return self._adds_leading_space

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    def encode(self, text: str) -> list[int]:
        check_text(text)
        prefix = " " if text and self._adds_leading_space else ""
        return list((prefix + text).encode())

    def encode_space(self) -> list[int]:
        return [ord(" ")]

    def control_id(self, name: str) -> int | None:
        return self._ids.get(name)

    def id_to_piece(self, token_id: int) -> str:
        if token_id < FIRST_CONTROL_ID:
            return f"<0x{token_id:02X}>"
        return self._names[token_id - FIRST_CONTROL_ID]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < FIRST_CONTROL_ID else b""
