"""What a chat may be given in OpenAI's shapes, as the values that go on the wire.

Fields that are None are as good as missing: OpenAI's own objects, dumped, are full of them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mixfleet_broker.errors import InvalidMessagesError, MessageError
from mixfleet_broker.messages import ChatMessage, OutputFormat, ToolCall, ToolSpec
from mixfleet_broker.schema import Fields, items, text

Messages = str | Sequence[Mapping[str, Any] | ChatMessage]
"""A question, or a whole conversation whose last turn is the user's or a tool's."""


def conversation(messages: Messages, system: str | None) -> tuple[ChatMessage, ...]:
    """Return the turns of a conversation.

    Raises:
        InvalidMessagesError: The messages cannot be one.
        MessageError: A field of a call is not what it must be.
    """
    if isinstance(messages, str):
        messages = (ChatMessage(role="user", content=messages),)
    turns = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    if system is None:
        return turns
    if turns and turns[0].role == "system":
        raise InvalidMessagesError("two system texts: system=... and the first message")
    return (ChatMessage(role="system", content=system), *turns)


def tools_of(tools: Sequence[Mapping[str, Any]]) -> tuple[ToolSpec, ...]:
    """Return the tools of ``{"type": "function", "function": {"name", "description", ...}}``.

    Raises:
        MessageError: A field is unknown or not what it must be.
    """
    return tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))


def tool_choice_of(choice: str | Mapping[str, Any] | None) -> str:
    """Return ``auto``, ``none``, ``required``, or ``=`` and a name; None is ``auto``.

    Raises:
        MessageError: It is neither a word nor ``{"type": "function", "function": {"name"}}``.
    """
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    function = _function(choice, "tool_choice")
    name = function.text("name")
    function.done()
    return f"={name}"


def output_format_of(response_format: Mapping[str, Any] | None) -> OutputFormat | None:
    """Return what the answer's text must be; None for ``{"type": "text"}``.

    The name, the description and the strictness of a schema say nothing to us: the text of an
    answer always keeps to it.

    Raises:
        MessageError: It is none of OpenAI's three.
    """
    if response_format is None:
        return None
    fields = _fields(response_format, "response_format")
    kind = fields.text("type")
    given = fields.take("json_schema")
    fields.done()
    if kind == "json_schema":
        return OutputFormat(kind="json_schema", schema=_schema(given))
    if given is not None or kind not in ("text", "json_object"):
        raise MessageError(
            f"response_format.type={kind[:20]!r}: must be text, json_object, or json_schema with a "
            "json_schema"
        )
    return OutputFormat(kind="json_object") if kind == "json_object" else None


def _message(message: Mapping[str, Any] | ChatMessage, where: str) -> ChatMessage:
    if isinstance(message, ChatMessage):
        return message
    if not isinstance(message, Mapping):
        raise InvalidMessagesError(f"a message is a mapping, not {type(message).__name__}")
    given = {name: value for name, value in message.items() if value is not None}
    calls = items(given.pop("tool_calls", ()), f"{where}.tool_calls")
    needed = {"role"} if calls else {"role", "content"}
    if not needed <= set(given) <= {"role", "content", "tool_call_id"}:
        raise InvalidMessagesError(
            "a message has the fields role and content, and maybe tool_calls or tool_call_id, "
            f"not {sorted(message)}"
        )
    return ChatMessage(
        role=given["role"],  # the schema checks it
        content=given.get("content", ""),
        tool_calls=tuple(_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)),
        call_id=given.get("tool_call_id"),
    )


def _call(call: object, where: str) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    fields = _fields(call, where)
    call_id = fields.text("id")
    function = _function(fields, where)
    found = ToolCall(
        call_id=call_id, name=function.text("name"), arguments=function.text("arguments")
    )
    function.done()
    return found


def _tool(tool: object, where: str) -> ToolSpec:
    function = _function(tool, where)
    name, description = function.text("name"), function.text_or_none("description")
    parameters, strict = function.take("parameters"), function.take("strict")
    function.done()
    if strict:
        raise MessageError(
            f"{where}.function.strict: only tool_choice holds arguments to their schema; "
            "leave it out"
        )
    return ToolSpec(
        name=name,
        description=description or "",
        parameters=_json({} if parameters is None else parameters, f"{where}.function.parameters"),
    )


def _function(value: object, where: str) -> Fields:
    """Return what is under ``function`` in ``{"type": "function", "function": {...}}``."""
    fields = value if isinstance(value, Fields) else _fields(value, where)
    kind = fields.take("type")
    if kind not in (None, "function"):
        raise MessageError(f"{where}.type={str(kind)[:20]!r}: must be function")
    function = _fields(fields.take("function"), f"{where}.function")
    fields.done()
    return function


def _schema(given: object) -> str:
    fields = _fields(given, "response_format.json_schema")
    for name in ("name", "description"):
        fields.text_or_none(name)
    schema, _ = fields.take("schema"), fields.take("strict")
    fields.done()
    return _json(schema, "response_format.json_schema.schema")


def _json(value: object, where: str) -> str:
    try:
        return text(json.dumps(value, ensure_ascii=False), where)
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"{where}: not JSON ({error})") from error


def _fields(value: object, where: str) -> Fields:
    if isinstance(value, Mapping):
        value = {name: item for name, item in value.items() if item is not None}
    return Fields(value, where)
