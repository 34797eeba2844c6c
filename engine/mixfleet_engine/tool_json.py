"""Tools, calls and results as the JSON text that Mistral's models were trained on.

It is what ``json.dumps`` writes, put together from parts: so that a result of any depth can only
fail in its own part, where it is then taken for text.
"""

import json
from collections.abc import Sequence

from mixfleet_engine.conversation import Tool, ToolCall


def tools_text(tools: Sequence[Tool]) -> str:
    """Return the list that stands between ``[AVAILABLE_TOOLS]`` and its end."""
    return f"[{', '.join(map(_tool_text, tools))}]"


def calls_text(calls: Sequence[ToolCall], *, ids: bool) -> str:
    """Return the list that stands after ``[TOOL_CALLS]``, with or without the calls' ids."""
    return f"[{', '.join(_call_text(call, ids=ids) for call in calls)}]"


def result_text(content: str, call_id: str) -> str:
    """Return what stands between ``[TOOL_RESULTS]`` and its end in version 3."""
    return f'{{"content": {_value_text(content)}, "call_id": {_quoted(call_id)}}}'


def named_result_text(content: str, name: str) -> str:
    """Return what stands between ``[TOOL_RESULTS]`` and its end in version 2."""
    return f'[{{"name": {_quoted(name)}, "content": {_value_text(content)}}}]'


def _tool_text(tool: Tool) -> str:
    function = (
        f'{{"name": {_quoted(tool.name)}, "description": {_quoted(tool.description)}, '
        f'"parameters": {_value_text(tool.parameters)}}}'
    )
    return f'{{"type": "function", "function": {function}}}'


def _call_text(call: ToolCall, *, ids: bool) -> str:
    call_id = f', "id": {_quoted(call.call_id)}' if ids else ""
    name, arguments = _quoted(call.name), _value_text(call.arguments)
    return f'{{"name": {name}, "arguments": {arguments}{call_id}}}'


def _value_text(text: str) -> str:
    """Return JSON as ``json.dumps`` writes it; text that is no JSON becomes a JSON string.

    Nothing at all is an empty object, as in Mistral's own library.
    """
    try:
        written = json.dumps(json.loads(text or "{}"), ensure_ascii=False)
        written.encode()  # an escaped half of a surrogate pair is JSON and no text
    except (ValueError, RecursionError):
        return _quoted(text)
    return written


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
