"""Input and output items of ``/v1/responses``, and the conversation that they make.

What a response gave as output may come back as input, as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Tag, TypeAdapter, field_validator, model_validator

from mixfleet_broker.gateway.openai_schema import Body
from mixfleet_broker.messages import ChatMessage, Role, ToolCall

Status = Literal["in_progress", "completed", "incomplete"]


class Part(Body):
    """A piece of text."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str = ""
    refusal: str = ""
    # What output carries when it comes back.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Item(Body):
    """What all items share."""

    id: str | None = None
    status: Status | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        # Clients send back what they got with all that they know of, most of it null.
        if not isinstance(value, dict):
            return value
        return {name: held for name, held in value.items() if held is not None}


class MessageItem(Item):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part]

    @model_validator(mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            return value
        kind = "output_text" if value.get("role") == "assistant" else "input_text"
        return {**value, "content": [{"type": kind, "text": value["content"]}]}


class FunctionCallItem(Item):
    """A call that the model asked for."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutputItem(Item):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: list[Part]

    @field_validator("output", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _kind(value: Any) -> Any:
    if isinstance(value, dict):
        return value.get("type", "message")
    return getattr(value, "type", None)


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="unsupported_item",
        custom_error_message="must be an item of type message, function_call or "
        "function_call_output",
    ),
]
_ITEMS: Final = TypeAdapter(list[InputItem])
_PREFIXES: Final = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}


def stored_items(items: Sequence[InputItem], job_id: str) -> list[dict[str, Any]]:
    """Return items as they are kept and listed: each has an id."""
    values = []
    for index, item in enumerate(items):
        item_id = item.id or f"{_PREFIXES[item.type]}_{job_id}_in{index}"
        value = item.model_dump(exclude_none=True, exclude_defaults=False)
        values.append({**value, "id": item_id, "status": item.status or "completed"})
    return values


def read_items(values: Sequence[dict[str, Any]]) -> list[InputItem]:
    """Return items that were kept; calls that the model did not write to their end are left out.

    Nobody can answer such a call, and no model takes arguments that are no JSON.
    """
    whole = [
        value
        for value in values
        if value.get("type") != "function_call" or value.get("status") != "incomplete"
    ]
    return _ITEMS.validate_python(whole)


def messages_of(items: Sequence[InputItem]) -> list[ChatMessage]:
    """Return the conversation; calls belong to the assistant's message before them."""
    messages: list[ChatMessage] = []
    for item in items:
        if isinstance(item, FunctionCallItem):
            _add_call(messages, item)
        elif isinstance(item, FunctionOutputItem):
            messages.append(
                ChatMessage(role="tool", content=_text(item.output), call_id=item.call_id)
            )
        else:
            role: Role = "system" if item.role == "developer" else item.role
            messages.append(ChatMessage(role=role, content=_text(item.content)))
    return messages


def _add_call(messages: list[ChatMessage], item: FunctionCallItem) -> None:
    call = ToolCall(call_id=item.call_id, name=item.name, arguments=item.arguments or "{}")
    if not messages or messages[-1].role != "assistant":
        messages.append(ChatMessage(role="assistant", content=""))
    messages[-1] = replace(messages[-1], tool_calls=(*messages[-1].tool_calls, call))


def _text(parts: Sequence[Part]) -> str:
    return "".join(part.text or part.refusal for part in parts)
