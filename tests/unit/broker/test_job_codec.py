"""The fields of a job beside its messages and settings; for those see test_messages.py."""

import json
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixfleet_broker.errors import MessageError
from mixfleet_broker.job_codec import (
    MAX_CALL_ID,
    MAX_SCHEMA_DEPTH,
    MAX_TOOL_NAME,
    MAX_TOOLS,
    MAX_TRACEPARENT,
    decode_job,
    encode_job,
)
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    OutputFormat,
    ToolCall,
    ToolSpec,
)

TOOL_LETTERS = "abzAZ019_-"
WEATHER = ["weather", "Of a place.", '{"type": "object"}']
ASKED = {"role": "user", "content": "Hi"}

texts = st.text(max_size=20)
names = st.text(TOOL_LETTERS, min_size=1, max_size=MAX_TOOL_NAME)
call_ids = st.text(min_size=1, max_size=MAX_CALL_ID)
objects = st.dictionaries(texts, st.none() | texts | st.integers(), max_size=3).map(json.dumps)
tools = st.builds(ToolSpec, name=names, description=texts, parameters=objects)
calls = st.builds(ToolCall, call_id=call_ids, name=names, arguments=objects)
messages = st.one_of(
    st.builds(ChatMessage, role=st.sampled_from(("system", "user")), content=texts),
    st.builds(
        ChatMessage,
        role=st.just("assistant"),
        content=texts,
        tool_calls=st.lists(calls, max_size=3).map(tuple),
    ),
    st.builds(ChatMessage, role=st.just("tool"), content=texts, call_id=call_ids),
)
formats = st.builds(OutputFormat, kind=st.just("json_object")) | st.builds(
    OutputFormat, kind=st.just("json_schema"), schema=objects
)


@st.composite
def jobs(draw: st.DrawFn) -> ChatJob:
    offered = draw(st.lists(tools, max_size=4, unique_by=lambda tool: tool.name))
    choices = ["auto", "none"]
    if offered:
        choices += ["required", *(f"={tool.name}" for tool in offered)]
    return ChatJob(
        job_id="job1",
        model="tiny",
        messages=tuple(draw(st.lists(messages, min_size=1, max_size=4))),
        tools=tuple(offered),
        tool_choice=draw(st.sampled_from(choices)),
        output_format=draw(st.none() | formats),
        traceparent=draw(st.none() | st.text(min_size=1, max_size=MAX_TRACEPARENT)),
    )


@given(jobs())
def test_a_chat_with_tools_survives_the_wire(job: ChatJob) -> None:
    assert decode_job(encode_job(job)) == job


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1).map(tuple), st.none() | formats)
def test_a_prompt_of_tokens_survives_the_wire(
    token_ids: tuple[int, ...], output_format: OutputFormat | None
) -> None:
    job = ChatJob(
        job_id="job1", model="tiny", prompt_token_ids=token_ids, output_format=output_format
    )
    assert decode_job(encode_job(job)) == job


def test_what_a_job_does_not_use_is_not_on_the_wire() -> None:
    # An older worker, which knows no newer fields, so takes the jobs that use none.
    job = ChatJob(job_id="job1", model="tiny", messages=(ChatMessage(role="user", content="Hi"),))
    value = msgpack.unpackb(encode_job(job))
    assert set(value) == {"v", "kind", "id", "model", "messages", "sampling"}
    assert set(value["messages"][0]) == {"role", "content"}


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


def test_a_schema_may_be_deep_up_to_its_limit() -> None:
    wire = {"messages": [ASKED], "tools": [["t", "", nested(MAX_SCHEMA_DEPTH)]]}
    assert decode_job(packed(**wire)).tools[0].parameters == nested(MAX_SCHEMA_DEPTH)


def packed(**fields: Any) -> bytes:
    return bytes(msgpack.packb({"v": 1, "kind": "chat", "id": "job1", "model": "tiny", **fields}))


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "", **fields}]}


CALL = ["id", "weather", "{}"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt_token_ids": []}, "exactly one of messages, prompt, prompt_token_ids"),
        ({"prompt_token_ids": [1], "prompt": "x"}, "exactly one of"),
        ({"prompt_token_ids": [1], "messages": [ASKED]}, "exactly one of"),
        ({"prompt_token_ids": [1, -1]}, "prompt_token_ids[1]=-1: must be from 0"),
        ({"prompt_token_ids": [1.0]}, "prompt_token_ids[0]: must be a whole number, is float"),
        ({"prompt_token_ids": b"\x01"}, "job.prompt_token_ids: must be a list, is bytes"),
        ({"prompt": "x", "tools": [WEATHER]}, "tools go with messages only"),
        ({"messages": [ASKED], "tools": [WEATHER] * (MAX_TOOLS + 1)}, "tools: 129 of them"),
        ({"messages": [ASKED], "tools": [WEATHER, WEATHER]}, "two are called 'weather'"),
        ({"messages": [ASKED], "tools": [["weather"]]}, "tools[0]: must be a list of 3 texts"),
        ({"messages": [ASKED], "tools": [["", "", "{}"]]}, "tools[0].name=''"),
        ({"messages": [ASKED], "tools": [["a b", "", "{}"]]}, "tools[0].name='a b'"),
        ({"messages": [ASKED], "tools": [["é", "", "{}"]]}, "tools[0].name='é'"),
        ({"messages": [ASKED], "tools": [["x" * 65, "", "{}"]]}, "1 to 64 letters"),
        ({"messages": [ASKED], "tools": [["t", "", "{"]]}, "tools[0].parameters: not JSON"),
        ({"messages": [ASKED], "tools": [["t", "", "[]"]]}, "must be a JSON object, is list"),
        (
            {"messages": [ASKED], "tools": [["t", "", nested(MAX_SCHEMA_DEPTH + 2)]]},
            "more than 64 maps and lists",
        ),
        ({"messages": [ASKED], "tools": [["t", "", "[" * 100_000]]}, "not JSON"),
        ({"messages": [ASKED], "tool_choice": "any"}, "job.tool_choice='any'"),
        ({"messages": [ASKED], "tool_choice": "required"}, "there are no tools"),
        (
            {"messages": [ASKED], "tools": [WEATHER], "tool_choice": "=time"},
            "job.tool_choice='=time': there is no such tool",
        ),
        (turn(tool_calls=[["", "weather", "{}"]]), "messages[0].tool_calls[0].id: 0 characters"),
        (turn(tool_calls=[["x" * 129, "weather", "{}"]]), "129 characters, must be from 1 to 128"),
        (turn(tool_calls=[["id", "a b", "{}"]]), "messages[0].tool_calls[0].name='a b'"),
        (turn(tool_calls=[["id", "weather", "1"]]), "must be a JSON object, is int"),
        (turn(tool_calls=[["id", "weather"]]), "must be a list of 3 texts"),
        (turn(role="user", tool_calls=[CALL]), "only the assistant calls tools, not the user"),
        (turn(call_id="id"), "messages[0].call_id: belongs to the messages of a tool"),
        (turn(role="tool"), "messages[0].call_id: belongs to the messages of a tool"),
        (turn(role="tool", call_id=""), "messages[0].call_id: 0 characters"),
        ({"prompt": "x", "output_format": ["json_object"]}, "output_format: 1 parts, must be 2"),
        ({"prompt": "x", "output_format": ["json_object", "{}"]}, "output_format.kind"),
        ({"prompt": "x", "output_format": ["json_schema", None]}, "schema: must be text"),
        ({"prompt": "x", "output_format": ["json_schema", "[]"]}, "must be a JSON object"),
        ({"prompt": "x", "output_format": ["xml", None]}, "output_format.kind='xml'"),
        ({"prompt": "x", "traceparent": ""}, "traceparent: 0 characters"),
        ({"prompt": "x", "traceparent": "x" * 129}, "traceparent: 129 characters"),
    ],
)
def test_what_is_not_of_the_schema_is_refused_by_name(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(MessageError) as caught:
        decode_job(packed(**fields))
    assert text in str(caught.value)
