from typing import Any

import pytest

from mixfleet import Client
from mixfleet.errors import InvalidMessagesError, MessageError
from mixfleet_broker.job_codec import validate
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    JobEnd,
    JobEvent,
    OutputFormat,
    RunStarted,
    TokenChunk,
    ToolCall,
    ToolSpec,
    Usage,
)
from mixfleet_broker.settings import Settings
from mixfleet_broker.tool_call_text import tool_call_id
from support.fake_transport import FakeTransport, fleet

CALL = ToolCall(call_id="call_1", name="clock", arguments='{"zone": "UTC"}')
OPENAI_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "clock", "arguments": '{"zone": "UTC"}'},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def sent(messages: Any = "Hi", **given: Any) -> ChatJob:
    """Return the job that a chat of these becomes, checked as every way to the fleet does."""
    transport, clock = fleet()
    settings = Settings(redis="redis://nowhere")
    with Client(settings=settings, transport=transport, clock=clock) as client:
        client.chat(messages, **given)
    (kept,) = transport.jobs.values()
    validate(kept.job)
    return kept.job


def test_calls_and_results_become_messages_of_the_wire() -> None:
    job = sent(
        [
            {"role": "user", "content": "What time is it?", "name": None},
            {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL], "refusal": None},
            {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
            {"role": "assistant", "content": "Again.", "tool_calls": (CALL,)},
            ChatMessage(role="tool", content="noon", call_id="call_1"),
        ]
    )
    assert job.messages == (
        ChatMessage(role="user", content="What time is it?"),
        ChatMessage(role="assistant", content="", tool_calls=(CALL,)),
        ChatMessage(role="tool", content="noon", call_id="call_1"),
        ChatMessage(role="assistant", content="Again.", tool_calls=(CALL,)),
        ChatMessage(role="tool", content="noon", call_id="call_1"),
    )


def test_tools_become_tools_of_the_wire() -> None:
    weather = {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city",
            "parameters": {"type": "object", "title": "Städte"},
            "strict": False,
        },
    }
    assert sent(tools=[CLOCK, weather]).tools == (
        ToolSpec(name="clock"),
        ToolSpec(
            name="weather",
            description="Of a city",
            parameters='{"type": "object", "title": "Städte"}',
        ),
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (CLOCK, "=clock"),
        ("=clock", "=clock"),
    ],
)
def test_a_tool_choice_is_a_word_or_a_name(choice: Any, expected: str) -> None:
    assert sent(tools=[CLOCK], tool_choice=choice).tool_choice == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object", "json_schema": None}, OutputFormat(kind="json_object")),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": True},
            },
            OutputFormat(kind="json_schema", schema='{"type": "object"}'),
        ),
    ],
)
def test_a_response_format_is_one_of_three(given: Any, expected: OutputFormat | None) -> None:
    assert sent(response_format=given).output_format == expected


def tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "clock", **function}}]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"tools": [7]}, r"tools\[0\]: must be a map, is int"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\].type='web_search': must be function"),
        ({"tools": [{"name": "clock"}]}, r"tools\[0\].function: must be a map, is missing"),
        ({"tools": tool(strict=True)}, r"tools\[0\].function.strict: only tool_choice holds"),
        ({"tools": tool(icon="x")}, r"tools\[0\].function: unknown field 'icon'"),
        ({"tools": tool(parameters={1, 2})}, r"tools\[0\].function.parameters: not JSON"),
        ({"tools": tool(parameters=[])}, r"tools\[0\].parameters: must be a JSON object, is list"),
        ({"tools": tool(description="\ud800")}, "lone surrogate"),
        ({"tools": tool(), "tool_choice": "maybe"}, "job.tool_choice='maybe': must be auto"),
        ({"tools": tool(), "tool_choice": {"type": "function"}}, "tool_choice.function: must be a"),
        (
            {"tools": tool(), "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "job.tool_choice='=x': there is no such tool",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type='xml': must be text"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.type='text'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema: must be a map, is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "output_format.schema: must be a JSON object, is NoneType",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 7}]}, "tool_calls: must be a list"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            r"messages\[0\].tool_calls\[0\].function: must be a map",
        ),
        (
            {"messages": [{"role": "tool", "content": "noon"}]},
            r"messages\[0\].call_id: belongs to the messages of a tool, and to each",
        ),
    ],
)
def test_what_is_of_another_shape_is_refused_by_name(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(MessageError, match=problem):
        sent(**given)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "a", "call_id": "b"},
    ],
)
def test_a_message_that_says_nothing_or_has_other_fields_is_refused(
    message: dict[str, Any],
) -> None:
    with pytest.raises(InvalidMessagesError, match="role and content, and maybe tool_calls"):
        sent([message])


# --- what comes back ----------------------------------------------------------------------------


def answering(*chunks: tuple[str, str]) -> tuple[Client, FakeTransport]:
    """Return a client whose answer has these texts, each with its part."""
    events: list[tuple[float, JobEvent]] = [
        (0.1, RunStarted(run=7, worker_id="gpu-0", num_tokens=0))
    ]
    for number, (part, text) in enumerate(chunks, 1):
        chunk = TokenChunk(
            num_tokens=number,
            text=text,
            token_ids=(number,),
            part="tool_calls" if part == "tool_calls" else "text",
        )
        events.append((0.1, chunk))
    usage = Usage(prompt_tokens=5, completion_tokens=len(chunks))
    events.append((0.0, JobEnd(state="finished", finish_reason="stop", usage=usage)))
    transport, clock = fleet(events)
    settings = Settings(redis="redis://nowhere")
    return Client(settings=settings, transport=transport, clock=clock), transport


def test_tool_calls_are_no_text_and_are_there_after_the_end() -> None:
    client, _ = answering(
        ("text", "I look"),
        ("text", "."),
        ("tool_calls", '[{"name": "clock", "argu'),
        ("tool_calls", 'ments": {"zone": 1}}'),
        ("tool_calls", "]"),
    )
    stream = client.chat("What time?", tools=[CLOCK])
    assert not stream.tool_calls
    assert list(stream) == ["I look", "."]
    assert stream.text == "I look."
    (call,) = stream.tool_calls
    assert call == ToolCall(
        call_id=tool_call_id(stream.job_id, 0), name="clock", arguments='{"zone": 1}'
    )
    result = stream.result()
    assert (result.text, result.tool_calls) == ("I look.", (call,))
    assert result.tool_calls_problem is None


def test_calls_of_a_stream_can_be_sent_back_with_their_results() -> None:
    client, transport = answering(("tool_calls", '[{"name": "clock"}]'))
    stream = client.chat("What time?", tools=[CLOCK])
    stream.result()
    (call,) = stream.tool_calls
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "What time?"},
        {"role": "assistant", "content": stream.text, "tool_calls": stream.tool_calls},
        {"role": "tool", "content": "noon", "tool_call_id": call.call_id},
    ]
    again = client.chat(history, tools=[CLOCK])
    assert transport.jobs[again.job_id].job.messages[1].tool_calls == (call,)


def test_calls_that_are_cut_off_are_said_to_be() -> None:
    client, _ = answering(("tool_calls", '[{"name": "clock"}, {"name": "cl'))
    result = client.chat("What time?", tools=[CLOCK]).result()
    assert [call.name for call in result.tool_calls] == ["clock"]
    assert result.tool_calls_problem == "the list of calls is cut off after 32 characters"


def test_an_answer_without_calls_has_none_and_no_problem() -> None:
    client, _ = answering(("text", "Noon."))
    result = client.chat("What time?", tools=[CLOCK]).result()
    assert (result.tool_calls, result.tool_calls_problem) == ((), None)
