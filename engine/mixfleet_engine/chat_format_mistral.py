"""Formats whose marks are plain text: Mistral's first, and that of AIME's article."""

from collections.abc import Sequence

from mixfleet_engine.conversation import Dialogue, Message, Tool, dialogue
from mixfleet_engine.prompt_encoding import naming_the_message, needed_id
from mixfleet_engine.tokenizer import Tokenizer
from mixfleet_engine.tool_turns import refuse_tools


class MistralV1Format:
    """Mixtral 8x7B: ``<s> [INST] question [/INST] answer</s> [INST] ...``, the marks plain text.

    The system prompt stands before the first question.
    """

    name = "mistral-v1"
    tool_calls_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos_id = needed_id(self.name, "BOS", tokenizer.bos_id)
        self._eos_id = needed_id(self.name, "EOS", tokenizer.eos_id)
        self.stop_token_ids = frozenset({self._eos_id})

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the prompt; see :meth:`ChatFormat.encode`."""
        refuse_tools(self.name, messages, tools)
        found = dialogue(messages)
        with naming_the_message(self._tokenizer, messages):
            return self._encode(found)

    def continues(self, messages: Sequence[Message]) -> bool:
        """Whether the last message is the assistant's."""
        refuse_tools(self.name, messages, ())
        return dialogue(messages).continues

    def _encode(self, found: Dialogue) -> list[int]:
        asked = f"{found.system_prompt}\n\n" if found.system_prompt else ""
        ids = [self._bos_id]
        for turn in found.turns:
            if turn.role == "user":
                ids += self._tokenizer.encode(f"[INST] {asked}{turn.content} [/INST]")
                asked = ""  # it belongs to the first question alone
            else:
                ids += [*self._tokenizer.encode(turn.content), self._eos_id]
        return ids[:-1] if found.continues else ids


class AimeFormat:
    """The format of AIME's Mixtral article, a dialect of Llama 2's.

    ``<s> [INST] <<SYS>> system <</SYS>> question [/INST] answer </s> <s> [INST] ...``: every pair
    of question and answer has its own BOS and EOS, with one space around each, and all marks are
    plain text, whatever control tokens the model has.
    """

    name = "aime"
    tool_calls_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos_id = needed_id(self.name, "BOS", tokenizer.bos_id)
        self._eos_id = needed_id(self.name, "EOS", tokenizer.eos_id)
        self.stop_token_ids = frozenset({self._eos_id})

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the prompt; see :meth:`ChatFormat.encode`."""
        refuse_tools(self.name, messages, tools)
        found = dialogue(messages)
        with naming_the_message(self._tokenizer, messages):
            return self._encode(found)

    def continues(self, messages: Sequence[Message]) -> bool:
        """Whether the last message is the assistant's."""
        refuse_tools(self.name, messages, ())
        return dialogue(messages).continues

    def _encode(self, found: Dialogue) -> list[int]:
        system = f"<<SYS>> {found.system_prompt} <</SYS>> " if found.system_prompt else ""
        ids: list[int] = []
        text = ""
        for index, turn in enumerate(found.turns):
            if turn.role == "assistant":
                text += f" {turn.content}"
                if index < len(found.turns) - 1:
                    ids += [*self._spaced(f"{text} "), self._eos_id]
                    ids += self._tokenizer.encode_space()
                    text = ""
                continue
            if text:  # two questions in a row, kept apart by a system message
                text += " "
            else:
                ids.append(self._bos_id)
            text += f"[INST] {system}{turn.content} [/INST]"
            system = ""
        return ids + self._spaced(text)

    def _spaced(self, text: str) -> list[int]:
        """Return the tokens of ``text`` and the one space that stands before it."""
        space = "" if self._tokenizer.adds_leading_space else " "
        return self._tokenizer.encode(space + text)
