"""Mistral's formats whose marks are control tokens, and which know tools: versions 2 and 3."""

from collections.abc import Sequence

from mixfleet_engine.conversation import Dialogue, Message, Tool, dialogue
from mixfleet_engine.prompt_encoding import naming_the_message, needed_id
from mixfleet_engine.tokenizer import Tokenizer
from mixfleet_engine.tool_ids import with_model_ids
from mixfleet_engine.tool_json import calls_text, named_result_text, result_text, tools_text
from mixfleet_engine.tool_turns import (
    call_of,
    check_single_results,
    check_tool_turns,
    refuse_tools,
)

_TOOL_MARKS = (
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)


class MistralV3Format:
    """Mixtral 8x22B: ``<s>[INST] question[/INST] answer</s>[INST] ...``, the marks control tokens.

    The system prompt stands before the last question, and the tools before that question's mark.
    Calls are ``[TOOL_CALLS] [{...}]</s>``, after the text of their message if there is any, as when
    the model itself writes both; a result is ``[TOOL_RESULTS] {...}[/TOOL_RESULTS]``.
    """

    name = "mistral-v3"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos_id = needed_id(self.name, "BOS", tokenizer.bos_id)
        self._eos_id = needed_id(self.name, "EOS", tokenizer.eos_id)
        self._begin = needed_id(self.name, "[INST]", tokenizer.control_id("[INST]"))
        self._end = needed_id(self.name, "[/INST]", tokenizer.control_id("[/INST]"))
        self._marks = _ids_of(tokenizer, _TOOL_MARKS)
        self.tool_calls_id = self._marks.get("[TOOL_CALLS]")
        self.stop_token_ids = frozenset({self._eos_id})

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Return the prompt; see :meth:`ChatFormat.encode`."""
        self._check_tools(messages, tools)
        found = dialogue(with_model_ids(messages))
        with naming_the_message(self._tokenizer, messages):
            return self._encode(found, tools)

    def continues(self, messages: Sequence[Message]) -> bool:
        """Whether the last message is the assistant's."""
        self._check_tools(messages, ())
        return dialogue(messages).continues

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        if self._marks:
            check_tool_turns(messages)
        else:
            refuse_tools(self.name, messages, tools)

    def _encode(self, found: Dialogue, tools: Sequence[Tool]) -> list[int]:
        last = max(i for i, turn in enumerate(found.turns) if turn.role == "user")
        ids = [self._bos_id]
        for index, turn in enumerate(found.turns):
            if turn.role == "assistant":
                ids += self._answer(turn, is_old=index < last)
            elif turn.role == "tool":
                ids += self._result(turn, found.turns[:index], is_old=index < last)
            elif index == last:
                ids += self._available(tools)
                asked = f"{found.system_prompt}\n\n" if found.system_prompt else ""
                ids += self._question(asked + turn.content)
            else:
                ids += self._question(turn.content)
        return ids[:-1] if found.continues else ids

    def _available(self, tools: Sequence[Tool]) -> list[int]:
        return self._marked("[AVAILABLE_TOOLS]", tools_text(tools)) if tools else []

    def _question(self, text: str) -> list[int]:
        return [self._begin, *self._tokenizer.encode(text), self._end]

    def _answer(self, turn: Message, *, is_old: bool) -> list[int]:  # noqa: ARG002 - for version 2
        ids = self._tokenizer.encode(turn.content.rstrip(" "))
        return [*ids, *self._calls(turn, ids=True), self._eos_id]

    def _calls(self, turn: Message, *, ids: bool) -> list[int]:
        if not turn.tool_calls:
            return []
        text = calls_text(turn.tool_calls, ids=ids)
        return [self._marks["[TOOL_CALLS]"], *self._tokenizer.encode(text)]

    def _result(
        self,
        turn: Message,
        before: Sequence[Message],  # noqa: ARG002 - for version 2, as is the next
        *,
        is_old: bool,  # noqa: ARG002
    ) -> list[int]:
        return self._marked("[TOOL_RESULTS]", result_text(turn.content, turn.call_id or ""))

    def _marked(self, mark: str, text: str) -> list[int]:
        end = self._marks[mark.replace("[", "[/")]
        return [self._marks[mark], *self._tokenizer.encode(text), end]


class MistralV2Format(MistralV3Format):
    """The first Mixtral 8x22B; it differs from ``mistral-v3`` only where tools are used.

    Calls and results before the last question are left out, and neither has an id: a result bears
    the tool's name, and a turn has one only.
    """

    name = "mistral-v2"

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        super()._check_tools(messages, tools)
        check_single_results(self.name, messages)

    def _answer(self, turn: Message, *, is_old: bool) -> list[int]:
        if is_old and not turn.content:
            return []
        calls = [] if is_old else self._calls(turn, ids=False)
        return [*self._tokenizer.encode(turn.content.rstrip(" ")), *calls, self._eos_id]

    def _result(self, turn: Message, before: Sequence[Message], *, is_old: bool) -> list[int]:
        if is_old:
            return []
        text = named_result_text(turn.content, call_of(turn, before).name)
        return self._marked("[TOOL_RESULTS]", text)


def _ids_of(tokenizer: Tokenizer, names: Sequence[str]) -> dict[str, int]:
    """Return the ids of control tokens by their names; nothing if the tokenizer lacks one."""
    ids = {name: tokenizer.control_id(name) for name in names}
    found = {name: token_id for name, token_id in ids.items() if token_id is not None}
    return found if len(found) == len(names) else {}
