"""Formats of question and answer in turn: Mistral's own three, and that of AIME's article."""

from collections.abc import Sequence

from mixfleet_engine.conversation import Dialogue, Message, dialogue
from mixfleet_engine.prompt_encoding import naming_the_message, needed_id
from mixfleet_engine.tokenizer import Tokenizer


class MistralV1Format:
    """Mixtral 8x7B: ``<s> [INST] question [/INST] answer</s> [INST] ...``, the marks plain text.

    The system prompt stands before the first question.
    """

    name = "mistral-v1"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos = [needed_id(self.name, "BOS", tokenizer.bos_id)]
        self._eos_id = needed_id(self.name, "EOS", tokenizer.eos_id)
        self.stop_token_ids = frozenset({self._eos_id})

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt; see :meth:`ChatFormat.encode`."""
        found = dialogue(messages)
        with naming_the_message(self._tokenizer, messages):
            return self._encode(found)

    def continues(self, messages: Sequence[Message]) -> bool:
        """Whether the last message is the assistant's."""
        return dialogue(messages).continues

    def _encode(self, found: Dialogue) -> list[int]:
        system_turn = self._system_turn(found)
        ids = list(self._bos)
        for index, turn in enumerate(found.turns):
            if turn.role == "user":
                asked = f"{found.system_prompt}\n\n" if index == system_turn else ""
                ids += self._question(asked + turn.content)
            else:
                ids += [*self._answer(turn.content), self._eos_id]
        return ids[:-1] if found.continues else ids

    def _system_turn(self, found: Dialogue) -> int | None:
        """Return the index of the turn that takes the system prompt."""
        return 0 if found.system_prompt else None

    def _question(self, text: str) -> list[int]:
        return self._tokenizer.encode(f"[INST] {text} [/INST]")

    def _answer(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class MistralV3Format(MistralV1Format):
    """Mixtral 8x22B: ``<s>[INST] question[/INST] answer</s>[INST] ...``, the marks control tokens.

    The system prompt stands before the last question. ``mistral-v2`` differs only where tools are
    used.
    """

    name = "mistral-v3"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._begin = needed_id(self.name, "[INST]", tokenizer.control_id("[INST]"))
        self._end = needed_id(self.name, "[/INST]", tokenizer.control_id("[/INST]"))

    def _system_turn(self, found: Dialogue) -> int | None:
        users = [index for index, turn in enumerate(found.turns) if turn.role == "user"]
        return users[-1] if found.system_prompt else None

    def _question(self, text: str) -> list[int]:
        return [self._begin, *self._tokenizer.encode(text), self._end]

    def _answer(self, text: str) -> list[int]:
        return self._tokenizer.encode(text.rstrip(" "))


class MistralV2Format(MistralV3Format):
    """The first Mixtral 8x22B; as ``mistral-v3`` but for the tools, which are not offered."""

    name = "mistral-v2"


class AimeFormat:
    """The format of AIME's Mixtral article, a dialect of Llama 2's.

    ``<s> [INST] <<SYS>> system <</SYS>> question [/INST] answer </s> <s> [INST] ...``: every pair
    of question and answer has its own BOS and EOS, with one space around each, and all marks are
    plain text, whatever control tokens the model has.
    """

    name = "aime"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos_id = needed_id(self.name, "BOS", tokenizer.bos_id)
        self._eos_id = needed_id(self.name, "EOS", tokenizer.eos_id)
        self.stop_token_ids = frozenset({self._eos_id})

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt; see :meth:`ChatFormat.encode`."""
        found = dialogue(messages)
        with naming_the_message(self._tokenizer, messages):
            return self._encode(found)

    def continues(self, messages: Sequence[Message]) -> bool:
        """Whether the last message is the assistant's."""
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
