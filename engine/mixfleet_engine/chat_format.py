"""Chat formats: a conversation into the prompt's token ids.

Each model was trained on one way of writing turns, and answers well in that one only. All formats
share one rule: the messages become text tokens, whatever they contain; the control tokens around
them come from their ids. Formats whose marks are themselves plain text (``mistral-v1``, ``aime``)
cannot tell a typed ``[INST]`` from their own: that is how those models were trained.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mixfleet_engine.chat_format_control import MistralV2Format, MistralV3Format
from mixfleet_engine.chat_format_free import ChatMLFormat, PlainFormat
from mixfleet_engine.chat_format_mistral import AimeFormat, MistralV1Format
from mixfleet_engine.conversation import Message, Tool, ToolCall
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.prompt_encoding import encode_prompt
from mixfleet_engine.tokenizer import Tokenizer, find_sentencepiece_file

__all__ = [
    "FORMATS",
    "ChatFormat",
    "Message",
    "Tool",
    "ToolCall",
    "chat_format",
    "default_format",
    "encode_prompt",
]

_V1_VOCAB_SIZE = 32_000
_V3_VOCAB_SIZE = 32_768


class ChatFormat(Protocol):
    """How one family of models wants a conversation written. Immutable."""

    @property
    def name(self) -> str:
        """Its name in settings: one of :data:`FORMATS`."""
        ...

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens by which the model ends its turn."""
        ...

    @property
    def tool_calls_id(self) -> int | None:
        """The control token after which the model writes its tool calls; None: it knows none."""
        ...

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the whole prompt, BOS included, up to where the answer begins.

        A last message of the assistant is the beginning of the answer, to be continued.

        Args:
            messages: The conversation.
            tools: What the assistant may call.

        Raises:
            InvalidMessagesError: The conversation does not fit, says which message and why; or it
                has to do with tools and the format knows none.
        """
        ...

    def continues(self, messages: Sequence[Message]) -> bool:
        """Whether the answer goes on in the middle of a text, see ``Detokenizer``.

        Raises:
            InvalidMessagesError: As :meth:`encode`.
        """
        ...


FORMATS: Mapping[str, Callable[[Tokenizer], ChatFormat]] = {
    "mistral-v1": MistralV1Format,
    "mistral-v2": MistralV2Format,
    "mistral-v3": MistralV3Format,
    "aime": AimeFormat,
    "chatml": ChatMLFormat,
    "plain": PlainFormat,
}
"""Every chat format by its name in settings."""


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """Return the chat format called ``name`` for a model with this tokenizer.

    Raises:
        ConfigError: There is no such format, or the tokenizer lacks a control token it needs.
    """
    make = FORMATS.get(name)
    if make is None:
        raise ConfigError(f"chat_format={name!r}: must be one of {', '.join(FORMATS)}")
    return make(tokenizer)


def default_format(tokenizer: Tokenizer, path: Path | None = None) -> str:
    """Return the name of the format that a checkpoint was trained on, as far as it shows.

    What counts, in this order: the control tokens of ChatML; the version in the name of the
    tokenizer's file; Mistral's two sizes of vocabulary. The model's name never counts.

    Args:
        tokenizer: The checkpoint's.
        path: The checkpoint's directory or its tokenizer file.
    """
    if None not in (tokenizer.control_id("<|im_start|>"), tokenizer.control_id("<|im_end|>")):
        return "chatml"
    version = None if path is None else _file_version(path)
    if version is not None:
        return f"mistral-{version}"
    has_marks = None not in (tokenizer.control_id("[INST]"), tokenizer.control_id("[/INST]"))
    if tokenizer.vocab_size == _V3_VOCAB_SIZE and has_marks:
        return "mistral-v3"
    return "mistral-v1" if tokenizer.vocab_size == _V1_VOCAB_SIZE else "plain"


def _file_version(path: Path) -> str | None:
    """Return ``v1``, ``v2`` or ``v3`` if the tokenizer's file is called so."""
    file = path if path.is_file() else find_sentencepiece_file(path)
    version = "" if file is None else file.suffix.removeprefix(".")
    return version if f"mistral-{version}" in FORMATS else None
