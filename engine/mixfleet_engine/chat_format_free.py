"""Formats that take messages in any order: ChatML, and none at all."""

import re
from collections.abc import Sequence

from mixfleet_engine.conversation import Message, Tool, check_messages
from mixfleet_engine.prompt_encoding import encode_prompt, naming_the_message, needed_id
from mixfleet_engine.tokenizer import Tokenizer
from mixfleet_engine.tool_turns import refuse_tools


class ChatMLFormat:
    r"""The demo model's: ``<|im_start|>role\ncontent<|im_end|>\n`` per message, roles in any order.

    Where the checkpoint's own template has a default system prompt, a conversation that does not
    begin with one gets it.
    """

    name = "chatml"
    tool_calls_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = needed_id(self.name, "<|im_start|>", tokenizer.control_id("<|im_start|>"))
        self._end = needed_id(self.name, "<|im_end|>", tokenizer.control_id("<|im_end|>"))
        self._default_system = _default_system_prompt(tokenizer.chat_template or "")
        ends = (self._end, tokenizer.eos_id, tokenizer.control_id("<|endoftext|>"))
        self.stop_token_ids = frozenset(token_id for token_id in ends if token_id is not None)

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the prompt; see :meth:`ChatFormat.encode`."""
        refuse_tools(self.name, messages, tools)
        check_messages(messages)
        with naming_the_message(self._tokenizer, messages):
            return self._encode(messages)

    def continues(self, messages: Sequence[Message]) -> bool:  # noqa: ARG002 - the protocol's
        """Always: an answer follows a line break, not a control token."""
        return True

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        ids: list[int] = []
        if self._default_system is not None and messages[0].role != "system":
            ids += self._turn(Message(role="system", content=self._default_system))
        for message in messages[:-1]:
            ids += self._turn(message)
        if messages[-1].role == "assistant":
            return ids + self._opening("assistant", messages[-1].content)
        return ids + self._turn(messages[-1]) + self._opening("assistant", "")

    def _turn(self, message: Message) -> list[int]:
        newline = self._tokenizer.encode("\n")
        return [*self._opening(message.role, message.content), self._end, *newline]

    def _opening(self, role: str, content: str) -> list[int]:
        return [self._start, *self._tokenizer.encode(f"{role}\n{content}")]


class PlainFormat:
    """No format: the messages' text, an empty line between them, to be continued.

    For base models, which were trained on no conversations at all.
    """

    name = "plain"
    tool_calls_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        eos = tokenizer.eos_id
        self.stop_token_ids = frozenset[int]() if eos is None else frozenset({eos})

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the prompt; see :meth:`ChatFormat.encode`."""
        refuse_tools(self.name, messages, tools)
        check_messages(messages)
        text = "\n\n".join(message.content for message in messages)
        with naming_the_message(self._tokenizer, messages):
            return encode_prompt(self._tokenizer, text)

    def continues(self, messages: Sequence[Message]) -> bool:  # noqa: ARG002 - the protocol's
        """Always: there is nothing but one text."""
        return True


def _default_system_prompt(template: str) -> str | None:
    r"""Return the system prompt that a ChatML template writes out itself, if any.

    Templates are small programs; this looks for the one thing in them that matters here, the
    literal text between ``<|im_start|>system`` and ``<|im_end|>``, its line break typed or ``\n``.
    """
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^{}'\"]+?)<\|im_end\|>", template)
    return None if found is None else found[1]
