"""What a job says of its answer's form, as the grammar that the engine lets nothing else pass.

JSON is written in one way only, that of Mistral's own tool calls and of Python's ``json.dumps``:
``{"a": 1, "b": [1, 2]}``. So no answer can run on in white space.

A schema costs before it refuses: llguidance bounds most of that itself, and here is bounded what it
does not. The remainders of ``multipleOf`` are states of an automaton, of which 10,000 take 20 ms to
build and a million take 6 s; 500 properties take 20 ms, 2,000 of them 200 ms.
"""

import json
from collections.abc import Iterator
from decimal import Decimal
from math import inf, lcm
from typing import Any, Final

from mixfleet_broker.messages import ChatJob, ToolSpec
from mixfleet_engine.errors import InvalidRequestError
from mixfleet_engine.tokenizer import Tokenizer

TOOL_CALLS: Final = "[TOOL_CALLS]"
"""The control token before the calls."""
MAX_CALLS: Final = 16
"""Of one answer, so that none repeats itself for ever."""
MAX_PROPERTIES: Final = 500
"""Of one job's schemas together."""
MAX_MULTIPLE: Final = 10_000
"""Least common multiple of the digits of all ``multipleOf``, their decimal points left out."""
_SPACING: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_OPTIONS: Final = "x-guidance"
"""The keyword by which a schema would change these."""
_DECIDES_TYPE: Final = frozenset({"type", "$ref", "enum", "const", "anyOf", "oneOf", "allOf"})


def output_grammar(job: ChatJob, tokenizer: Tokenizer) -> str | None:
    """Return the grammar of the answer to ``job``, or None where it may be anything.

    Tools that the model may call, but need not, leave it free; with an output format beside them it
    may do either.

    Raises:
        InvalidRequestError: A schema is too large to be followed, or this model cannot do it.
    """
    calls = _called_tools(job)
    if job.output_format is None and not _must_call(job):
        return None
    _check_beginning(job)
    rules: list[str] = []
    ways: list[str] = []
    space = '" "? ' if tokenizer.adds_leading_space else ""
    if job.output_format is not None and not _must_call(job):
        ways.append(f"{space}answer")
        schema = _loaded("output_format.schema", job.output_format.schema or '{"type": "object"}')
        rules.append(f"answer: {_json_rule(schema)}")
    if calls:
        ways.append(f"<[{_control_id(tokenizer)}]> {space}calls")
        more = "" if job.tool_choice.startswith("=") else f' (", " call){{0,{MAX_CALLS - 1}}}'
        rules += [f'calls: "[" call{more} "]"', *_call_rules(calls)]
    return "\n".join([f"start: {' | '.join(ways)}", *rules]) + "\n"


def _must_call(job: ChatJob) -> bool:
    return job.tool_choice == "required" or job.tool_choice.startswith("=")


def _called_tools(job: ChatJob) -> list[ToolSpec]:
    """Return the tools that the answer may call."""
    if job.tool_choice == "none":
        return []
    if job.tool_choice.startswith("="):
        return [tool for tool in job.tools if tool.name == job.tool_choice[1:]]
    return list(job.tools)


def _check_beginning(job: ChatJob) -> None:
    if job.messages and job.messages[-1].role == "assistant":
        raise InvalidRequestError(
            "output_format and tool_choice: the last message is the assistant's, and an answer "
            "that has begun cannot be given a form; leave that message out"
        )


def _control_id(tokenizer: Tokenizer) -> int:
    token_id = tokenizer.control_id(TOOL_CALLS)
    if token_id is None:
        raise InvalidRequestError(
            f"tool_choice: this model cannot call tools, its tokenizer has no {TOOL_CALLS}"
        )
    return token_id


def _call_rules(tools: list[ToolSpec]) -> list[str]:
    """Return the rules ``call``, and two for each tool.

    Each parameter schema is a document of its own, so that its ``$ref`` find what they name.
    """
    names = " | ".join(f"call_{number}" for number in range(len(tools)))
    rules = [f"call: {names}"]
    schemas = [_loaded(f"the parameters of tool {tool.name}", tool.parameters) for tool in tools]
    _check_size(schemas)
    for number, (tool, schema) in enumerate(zip(tools, schemas, strict=True)):
        head = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        rules.append(f'call_{number}: {head} arguments_{number} "}}"')
        if not _DECIDES_TYPE & schema.keys():
            schema = {"type": "object", **schema}
        rules.append(f"arguments_{number}: {_json_rule(schema)}")
    return rules


def _loaded(name: str, text: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(text)
    if _OPTIONS in schema:
        raise InvalidRequestError(f"{name}: {_OPTIONS} is not a keyword that a job may use")
    return schema


def _json_rule(schema: dict[str, Any]) -> str:
    _check_size([schema])
    return f"%json {json.dumps({_OPTIONS: _SPACING, **schema})}"


def _check_size(schemas: list[dict[str, Any]]) -> None:
    nodes = [node for schema in schemas for node in _objects(schema)]
    num_properties = sum(
        len(node["properties"]) for node in nodes if isinstance(node.get("properties"), dict)
    )
    if num_properties > MAX_PROPERTIES:
        raise InvalidRequestError(
            f"the schemas have {num_properties} properties, the limit is {MAX_PROPERTIES}"
        )
    multiple = lcm(*(_digits(node["multipleOf"]) for node in nodes if "multipleOf" in node))
    if multiple > MAX_MULTIPLE:
        raise InvalidRequestError(
            "multipleOf: the least common multiple of all of them, decimal points left out, "
            f"is above {MAX_MULTIPLE}"
        )


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Give all JSON objects in a schema, itself included."""
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from _objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _objects(value)


def _digits(value: object) -> int:
    """Return a number without its decimal point: 5 for 0.05; 1 for what is no number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        return 1
    if isinstance(value, int):
        return value
    shown = f"{Decimal(repr(value)):f}".rstrip("0").rstrip(".")
    return int(shown.replace(".", ""))
