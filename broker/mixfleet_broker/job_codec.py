"""The bytes of a job (msgpack, schema 1), and every check that a job passes.

Wrong types, unknown fields, too large or too deep are a :class:`MessageError`. Nothing is
unpickled, imported or evaluated.
"""

import json
from typing import Any, Final, get_args

from mixfleet_broker.errors import MessageError
from mixfleet_broker.messages import (
    MAX_COUNT,
    ChatJob,
    ChatMessage,
    OutputFormat,
    Role,
    ToolCall,
    ToolSpec,
)
from mixfleet_broker.names import check_job_id, check_model_name
from mixfleet_broker.packing import pack, unpack
from mixfleet_broker.sampling_codec import read_sampling, sampling_map
from mixfleet_broker.schema import Fields, check_depth, integer, text
from mixfleet_broker.stock_job import chat_of_stock_job

SCHEMA_VERSION: Final = 1
MAX_TOOLS: Final = 128
MAX_TOOL_NAME: Final = 64
MAX_SCHEMA_DEPTH: Final = 64
"""Maps and lists inside each other in a JSON schema."""
MAX_CALL_ID: Final = 128
MAX_TRACEPARENT: Final = 128
_PROMPTS: Final = ("messages", "prompt", "prompt_token_ids")


def validate(job: ChatJob) -> None:
    """Check every field of ``job``, as the worker that gets it will.

    Raises:
        MessageError: The job cannot be sent; the text names the field and its value.
    """
    _read_job(_job_map(job))


def encode_job(job: ChatJob) -> bytes:
    """Return the bytes of a job; equal jobs give equal bytes.

    Raises:
        MessageError: As :func:`validate`, or the job is larger than ``MAX_MESSAGE_BYTES``.
    """
    value = _job_map(job)
    _read_job(value)
    return pack(value)


def encode_stock_job(job_id: str, model: str, data: bytes) -> bytes:
    """Return the bytes of a job that an rq producer enqueued; only :func:`decode_job` looks in.

    Args:
        job_id: rq's id of the job.
        model: The queue that it was in.
        data: The ``data`` field of rq's job, as it is.
    """
    return pack({"v": SCHEMA_VERSION, "kind": "rq", "id": job_id, "model": model, "data": data})


def decode_job(data: bytes) -> ChatJob:
    """Return the job in ``data``.

    Raises:
        MessageError: It is not of the schema.
    """
    value = unpack(data)
    if isinstance(value, dict) and value.get("kind") == "rq":
        value = chat_of_stock_job(value)
    return _read_job(value)


def _job_map(job: ChatJob) -> dict[str, object]:
    value: dict[str, object] = {
        "v": SCHEMA_VERSION,
        "kind": "chat",
        "id": job.job_id,
        "model": job.model,
    }
    if job.messages:
        value["messages"] = [_message_map(message) for message in job.messages]
    if job.prompt is not None:
        value["prompt"] = job.prompt
    if job.prompt_token_ids:
        value["prompt_token_ids"] = list(job.prompt_token_ids)
    if job.tools:
        value["tools"] = [[tool.name, tool.description, tool.parameters] for tool in job.tools]
    if job.tool_choice != "auto":
        value["tool_choice"] = job.tool_choice
    if job.output_format is not None:
        value["output_format"] = [job.output_format.kind, job.output_format.schema]
    if job.traceparent is not None:
        value["traceparent"] = job.traceparent
    value["sampling"] = sampling_map(job.sampling)
    return value


def _message_map(message: ChatMessage) -> dict[str, object]:
    value: dict[str, object] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        value["tool_calls"] = [[c.call_id, c.name, c.arguments] for c in message.tool_calls]
    if message.call_id is not None:
        value["call_id"] = message.call_id
    return value


def _read_job(value: object) -> ChatJob:
    fields = Fields(value, "job")
    version, kind = fields.take("v"), fields.take("kind")
    if version != SCHEMA_VERSION or kind != "chat":
        raise MessageError(
            f"job: schema {str(version)[:20]!r} of kind {str(kind)[:20]!r} is not known here, "
            f"only {SCHEMA_VERSION!r} of 'chat'"
        )
    sampling = fields.take("sampling")
    job = ChatJob(
        job_id=check_job_id(fields.text("id")),
        model=check_model_name(fields.text("model")),
        messages=tuple(
            _read_message(message, f"messages[{i}]")
            for i, message in enumerate(fields.items("messages"))
        ),
        prompt=fields.text_or_none("prompt"),
        prompt_token_ids=tuple(
            integer(token_id, f"prompt_token_ids[{i}]", 0, MAX_COUNT)
            for i, token_id in enumerate(fields.items("prompt_token_ids"))
        ),
        tools=_read_tools(fields.items("tools")),
        tool_choice=fields.text_or_none("tool_choice") or "auto",
        output_format=_read_output_format(fields),
        traceparent=_bounded(fields.text_or_none("traceparent"), "traceparent", MAX_TRACEPARENT),
        sampling=read_sampling(Fields({} if sampling is None else sampling, "sampling")),
    )
    fields.done()
    _check_whole(job)
    return job


def _check_whole(job: ChatJob) -> None:
    """Check what no field can say alone.

    Raises:
        MessageError: Fields do not go together.
    """
    given = [bool(job.messages), job.prompt is not None, bool(job.prompt_token_ids)]
    if given.count(True) != 1:
        raise MessageError(f"job: exactly one of {', '.join(_PROMPTS)} must be given")
    if job.tools and not job.messages:
        raise MessageError("job: tools go with messages only")
    choice, names = job.tool_choice, {tool.name for tool in job.tools}
    if choice in ("auto", "none"):
        return
    if choice != "required" and not choice.startswith("="):
        raise MessageError(
            f"job.tool_choice={choice[:80]!r}: must be auto, none, required or =name"
        )
    if not names:
        raise MessageError(f"job.tool_choice={choice[:80]!r}: there are no tools")
    if choice != "required" and choice[1:] not in names:
        raise MessageError(f"job.tool_choice={choice[:80]!r}: there is no such tool")


def _read_message(value: object, where: str) -> ChatMessage:
    fields = Fields(value, where)
    role = _read_role(fields.text("role"), where)
    message = ChatMessage(
        role=role,
        content=fields.text("content"),
        tool_calls=tuple(
            _read_call(call, f"{where}.tool_calls[{i}]")
            for i, call in enumerate(fields.items("tool_calls"))
        ),
        call_id=_bounded(fields.text_or_none("call_id"), f"{where}.call_id", MAX_CALL_ID),
    )
    fields.done()
    if message.tool_calls and role != "assistant":
        raise MessageError(f"{where}.tool_calls: only the assistant calls tools, not the {role}")
    if (message.call_id is not None) != (role == "tool"):
        raise MessageError(
            f"{where}.call_id: belongs to the messages of a tool, and to each of them"
        )
    return message


def _read_role(role: str, where: str) -> Role:
    for known in get_args(Role):
        if role == known:
            found: Role = known
            return found
    raise MessageError(f"{where}.role={role[:20]!r}: must be one of {', '.join(get_args(Role))}")


def _read_call(value: object, where: str) -> ToolCall:
    call_id, name, arguments = _texts(value, where, 3)
    check_json_object(arguments, f"{where}.arguments")
    return ToolCall(
        call_id=_bounded(call_id, f"{where}.id", MAX_CALL_ID) or "",
        name=_tool_name(name, f"{where}.name"),
        arguments=arguments,
    )


def _read_tools(values: list[object]) -> tuple[ToolSpec, ...]:
    if len(values) > MAX_TOOLS:
        raise MessageError(f"tools: {len(values)} of them, the limit is {MAX_TOOLS}")
    tools = []
    for i, value in enumerate(values):
        name, description, parameters = _texts(value, f"tools[{i}]", 3)
        check_json_object(parameters, f"tools[{i}].parameters")
        tools.append(
            ToolSpec(
                name=_tool_name(name, f"tools[{i}].name"),
                description=description,
                parameters=parameters,
            )
        )
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise MessageError(f"tools: two are called {name!r}")
    return tuple(tools)


def _read_output_format(fields: Fields) -> OutputFormat | None:
    values = fields.items("output_format")
    if not values:
        return None
    if len(values) != 2:
        raise MessageError(f"output_format: {len(values)} parts, must be 2")
    kind, schema = values
    if kind == "json_object" and schema is None:
        return OutputFormat(kind="json_object")
    if kind == "json_schema":
        found = text(schema, "output_format.schema")
        check_json_object(found, "output_format.schema")
        return OutputFormat(kind="json_schema", schema=found)
    raise MessageError(
        f"output_format.kind={str(kind)[:20]!r}: must be json_object, or json_schema with a schema"
    )


def check_json_object(document: str, where: str) -> None:
    """Check that ``document`` is a JSON object, not too deep.

    Raises:
        MessageError: It is not.
    """
    try:
        value: Any = json.loads(document)
    except (ValueError, RecursionError):
        raise MessageError(f"{where}: not JSON") from None
    if not isinstance(value, dict):
        raise MessageError(f"{where}: must be a JSON object, is {type(value).__name__}")
    check_depth(value, MAX_SCHEMA_DEPTH)


def _texts(value: object, where: str, number: int) -> list[str]:
    if not isinstance(value, list | tuple) or len(value) != number:
        raise MessageError(f"{where}: must be a list of {number} texts")
    return [text(item, f"{where}[{i}]") for i, item in enumerate(value)]


def _tool_name(name: str, where: str) -> str:
    good = name.replace("_", "a").replace("-", "a")
    if not (1 <= len(name) <= MAX_TOOL_NAME and good.isascii() and good.isalnum()):
        raise MessageError(
            f"{where}={name[:80]!r}: must be 1 to {MAX_TOOL_NAME} letters, digits, _ and -"
        )
    return name


def _bounded(value: str | None, where: str, limit: int) -> str | None:
    if value is not None and not 1 <= len(value) <= limit:
        raise MessageError(f"{where}: {len(value)} characters, must be from 1 to {limit}")
    return value
