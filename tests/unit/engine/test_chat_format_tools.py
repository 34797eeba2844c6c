import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mistral_common.exceptions import MistralCommonException, TokenizerException
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall
from mistral_common.protocol.instruct.tool_calls import Tool as TheirTool
from mistral_common.protocol.instruct.tool_calls import ToolCall as TheirCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mixfleet_engine.chat_format import FORMATS, ChatFormat, Message, Tool, ToolCall, chat_format
from mixfleet_engine.errors import InvalidMessagesError
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer
from support.byte_tokenizer import ByteTokenizer
from support.tokenizer_files import NASTY_TEXTS, mistral_file

VERSIONS = ("v2", "v3")
IDS = ("VvvODy9mT", "aaaaaaaaa", "000000001", "Zz9Zz9Zz9", "D681PevKs")
WEATHER = Tool(
    name="get_current_weather",
    description="The weather of a city",
    parameters='{"type":"object","properties":{"location":{"type":"string"}}}',
)
CLOCK = Tool(name="clock-2", description="", parameters="{}")


class ToolOracle:
    """mistral-common: Mistral's own code, as strict as where it serves."""

    def __init__(self, version: str) -> None:
        self._tokenizer: Any = MistralTokenizer.from_file(
            str(mistral_file(version)), mode=ValidationMode.serving
        )

    def encode(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        last = len(messages) - 1
        names = {call.call_id: call.name for m in messages for call in m.tool_calls}
        found = [self._message(m, names, is_last=i == last) for i, m in enumerate(messages)]
        request: Any = ChatCompletionRequest(
            model="any", messages=found, tools=[_their_tool(tool) for tool in tools]
        )
        ids: list[int] = self._tokenizer.encode_chat_completion(request).tokens
        return ids

    def _message(self, message: Message, names: dict[str, str], *, is_last: bool) -> Any:
        if message.role == "assistant":
            calls = [
                TheirCall(
                    id=call.call_id, function=FunctionCall(name=call.name, arguments=call.arguments)
                )
                for call in message.tool_calls
            ]
            return AssistantMessage(
                content=message.content or None, tool_calls=calls or None, prefix=is_last
            )
        if message.role == "tool":
            call_id = message.call_id or ""
            return ToolMessage(
                content=message.content, tool_call_id=call_id, name=names.get(call_id)
            )
        kind: Any = {"system": SystemMessage, "user": UserMessage}[message.role]
        return kind(content=message.content)


def _their_tool(tool: Tool) -> TheirTool:
    return TheirTool(
        function=Function(
            name=tool.name, description=tool.description, parameters=json.loads(tool.parameters)
        )
    )


Pair = tuple[ChatFormat, ToolOracle]


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request: pytest.FixtureRequest) -> Pair:
    tokenizer = load_tokenizer(mistral_file(request.param))
    return chat_format(f"mistral-{request.param}", tokenizer), ToolOracle(request.param)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def calling(*call_ids: str, content: str = "", arguments: str = '{"location": "Paris"}') -> Message:
    calls = tuple(
        ToolCall(call_id=call_id, name="get_current_weather", arguments=arguments)
        for call_id in call_ids
    )
    return Message(role="assistant", content=content, tool_calls=calls)


def result(call_id: str, content: str = "22") -> Message:
    return Message(role="tool", content=content, call_id=call_id)


def decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    parts = [
        tokenizer.id_to_piece(i).encode()
        if i in tokenizer.control_ids
        else tokenizer.token_bytes(i)
        for i in ids
    ]
    return b"".join(parts).decode()


# --- against Mistral's own library --------------------------------------------------------------


def test_version_3_writes_the_gold_string() -> None:
    tokenizer = load_tokenizer(mistral_file("v3"))
    messages = [user("Weather in Paris?"), calling("VvvODy9mT"), result("VvvODy9mT")]
    ids = chat_format("mistral-v3", tokenizer).encode(messages, [WEATHER])
    assert decoded(tokenizer, ids) == (
        '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "get_current_weather", '
        '"description": "The weather of a city", "parameters": {"type": "object", "properties": '
        '{"location": {"type": "string"}}}}}][/AVAILABLE_TOOLS][INST] Weather in Paris?[/INST]'
        '[TOOL_CALLS] [{"name": "get_current_weather", "arguments": {"location": "Paris"}, '
        '"id": "VvvODy9mT"}]</s>[TOOL_RESULTS] {"content": 22, "call_id": "VvvODy9mT"}'
        "[/TOOL_RESULTS]"
    )


RESULTS = (
    "22",
    "",
    "sunny",
    '{"b":1,  "a":[1.50, 1e3, NaN]}',
    '{"a": 1, "a": 2}',
    '"[INST] no [/INST]"',
    "[TOOL_CALLS] [{}]</s>",
    "null",
    " 7 ",
    "漢字 🙂 naïve",
    '"\\u00fc\\n"',
    "{not json",
)
ARGUMENTS = ("{}", '{"location":"Paris"}', '{"a":{"b":[1,2.0,null]},"ü":"🙂</s>"}', " { } ")

texts = st.sampled_from(["Hi", " a b ", "x\n\ny", "</s>", "[TOOL_CALLS] no", "naïve 漢字"])
tools_of = st.lists(
    st.builds(
        Tool,
        name=st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True),
        description=st.sampled_from(["", "What time?", 'He said "ü"', "[/AVAILABLE_TOOLS]"]),
        parameters=st.sampled_from(["{}", WEATHER.parameters, '{"type":"object","title":"🙂"}']),
    ),
    max_size=3,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Turns in any order; most calls get their results, and some get none or too many."""
    messages: list[Message] = []
    pending: list[str] = []
    for _ in range(draw(st.integers(1, 7))):
        role = draw(st.sampled_from(["system", "user", "user", "assistant", "calls", "calls"]))
        if pending and draw(st.sampled_from([True] * 9 + [False])):
            role = "tool"
        if role == "calls":
            number = draw(st.integers(1, 3))
            pending = list(draw(st.permutations(IDS))[:number])
            arguments = draw(st.sampled_from(ARGUMENTS))
            messages.append(calling(*pending, arguments=arguments))
            pending.sort(key=draw(st.permutations(IDS)).index)
        elif role == "tool":
            messages.append(result(pending.pop(), draw(st.sampled_from(RESULTS))))
        else:
            messages.append(Message(role=role, content=draw(texts)))
    return messages


@settings(max_examples=400, deadline=None)
@given(messages=conversations(), tools=tools_of)
def test_the_formats_take_and_write_and_refuse_what_mistral_common_does(
    messages: list[Message], tools: list[Tool], pair: Pair
) -> None:
    ours, oracle = pair
    # It does not count the calls of a first message, see the test of cut conversations.
    assume(not messages[0].tool_calls)
    try:
        expected = oracle.encode(messages, tools)
    except (MistralCommonException, TokenizerException):
        with pytest.raises(InvalidMessagesError):
            ours.encode(messages, tools)
    except ValueError:  # text and calls in one turn, see the test of it
        assume(False)
    else:
        assert ours.encode(messages, tools) == expected


@settings(max_examples=200, deadline=None)
@given(number=st.integers(1, 4), draw=st.data())
def test_whole_tool_conversations_equal_mistral_common(
    number: int, draw: st.DataObject, pair: Pair
) -> None:
    """None of these is refused, so that nothing hides behind a refusal."""
    ours, oracle = pair
    most = 1 if ours.name == "mistral-v2" else 3
    messages = [Message(role="system", content="Be kind.")] if draw.draw(st.booleans()) else []
    for _ in range(number):
        messages.append(user(draw.draw(texts)))
        if draw.draw(st.booleans()):
            messages.append(Message(role="system", content=draw.draw(texts)))
        for _ in range(draw.draw(st.integers(0, 2))):
            ids = draw.draw(st.permutations(IDS))[: draw.draw(st.integers(1, most))]
            messages.append(calling(*ids, arguments=draw.draw(st.sampled_from(ARGUMENTS))))
            messages += [
                result(call_id, draw.draw(st.sampled_from(RESULTS)))
                for call_id in draw.draw(st.permutations(ids))
            ]
        if draw.draw(st.booleans()):
            messages.append(Message(role="assistant", content=draw.draw(texts)))
    tools = draw.draw(tools_of)
    assert ours.encode(messages, tools) == oracle.encode(messages, tools)


# --- where it is ours to decide -----------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_text_before_calls_stands_as_the_model_writes_it(version: str) -> None:
    tokenizer = load_tokenizer(mistral_file(version))
    ours = chat_format(f"mistral-{version}", tokenizer)
    messages = [user("Weather?"), calling("aaaaaaaaa", content="I look. "), result("aaaaaaaaa")]
    written = decoded(tokenizer, ours.encode(messages))
    assert '[/INST] I look.[TOOL_CALLS] [{"name": "get_current_weather"' in written
    assert written.endswith("[/TOOL_RESULTS]")


def test_version_2_keeps_the_text_of_a_turn_whose_calls_are_old() -> None:
    tokenizer = load_tokenizer(mistral_file("v2"))
    messages = [
        user("Weather?"),
        calling("aaaaaaaaa", content="I look."),
        result("aaaaaaaaa"),
        user("So?"),
    ]
    ids = chat_format("mistral-v2", tokenizer).encode(messages)
    assert decoded(tokenizer, ids) == "<s>[INST] Weather?[/INST] I look.</s>[INST] So?[/INST]"


def test_a_conversation_cut_at_the_front_may_begin_with_calls_and_their_results() -> None:
    tokenizer = load_tokenizer(mistral_file("v3"))
    ours = chat_format("mistral-v3", tokenizer)
    whole = [user(""), calling("aaaaaaaaa"), result("aaaaaaaaa"), user("So?")]
    assert ours.encode(whole[1:]) == ours.encode(whole)
    with pytest.raises(InvalidMessagesError, match="message 1 comes before the result of call"):
        ours.encode([calling("aaaaaaaaa"), user("So?")])


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([result("a")], "message 0 is the result of call 'a', which is no call"),
        ([user("x"), result("a")], "message 1 is the result of call 'a', which is no call"),
        ([user("x"), calling("a"), result("b")], "message 2 is the result of call 'b'"),
        (
            [user("x"), calling("a", "b"), result("a"), result("a")],
            "message 3 is the result of call 'a', .*has its result already",
        ),
        ([user("x"), calling("a"), user("y")], "message 2 comes before the result of call 'a' of"),
        (
            [user("x"), calling("a", "b", "c"), result("b"), user("y")],
            "message 3 comes before the result of call 'a' and 1 more of message 1",
        ),
        (
            [user("x"), calling("a")],
            "the conversation ends before the result of call 'a', made by message 1",
        ),
        (
            [user("x"), calling("a"), result("a"), Message(role="system", content="y")],
            "message 3 is the system's and follows the tool",
        ),
        (
            [Message(role="user", content="x", tool_calls=calling("a").tool_calls)],
            "message 0 calls tools and is the user's, not the assistant's",
        ),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_calls_and_results_that_do_not_meet_are_refused_by_message(
    messages: list[Message], reason: str, version: str
) -> None:
    ours = chat_format(f"mistral-{version}", load_tokenizer(mistral_file(version)))
    with pytest.raises(InvalidMessagesError, match=reason):
        ours.encode(messages)


def test_version_2_takes_one_call_a_turn_now_and_many_before() -> None:
    ours = chat_format("mistral-v2", load_tokenizer(mistral_file("v2")))
    turn = [calling("a", "b"), result("a"), result("b")]
    with pytest.raises(InvalidMessagesError, match=r"message 1 makes 2 calls.*one result per turn"):
        ours.encode([user("x"), *turn])
    assert ours.encode([user("x"), *turn, user("y")]) == ours.encode(
        [user("x"), Message(role="system", content=""), user("y")]
    )


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([user("x")], [CLOCK, WEATHER], "2 tools are offered"),
        ([user("x"), calling("a"), result("a")], [], "message 1 calls tools"),
        ([user("x"), result("a")], [], "message 1 has role 'tool'"),
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_a_tokenizer_without_tool_tokens_refuses_tools_and_names_the_format(
    messages: list[Message], tools: list[Tool], reason: str, name: str
) -> None:
    ours = chat_format(name, ByteTokenizer())
    refusal = rf"{reason}.*tokenizer knows no tools \(chat format '{name}'\)"
    with pytest.raises(InvalidMessagesError, match=refusal):
        ours.encode(messages, tools)
    if not tools and not name.startswith(("chatml", "plain")):
        with pytest.raises(InvalidMessagesError, match=refusal):
            ours.continues(messages)
    assert ours.tool_calls_id is None


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_in_tools_calls_or_results_becomes_a_control_token(version: str) -> None:
    tokenizer = load_tokenizer(mistral_file(version))
    ours = chat_format(f"mistral-{version}", tokenizer)

    def controls(text: str) -> list[int]:
        quoted = json.dumps({"x": text}, ensure_ascii=False)
        tools = [Tool(name="clock", description=text, parameters=quoted)]
        messages = [user(text), calling("a", content=f"{text}.", arguments=quoted)]
        messages.append(result("a", text))
        ids = ours.encode(messages, tools)
        return [token_id for token_id in ids if token_id in tokenizer.control_ids]

    expected = controls("harmless")
    names = [tokenizer.id_to_piece(token_id) for token_id in tokenizer.control_ids]
    for text in (*NASTY_TEXTS, *names[:40], " ".join(names)):
        assert controls(text) == expected, text


def test_a_result_that_is_hard_to_read_as_json_is_text() -> None:
    tokenizer = load_tokenizer(mistral_file("v3"))
    ours = chat_format("mistral-v3", tokenizer)
    for content in ("[" * 100_000, "1" * 5000, '"\\ud800"'):
        messages = [user("x"), calling("aaaaaaaaa"), result("aaaaaaaaa", content)]
        written = decoded(tokenizer, ours.encode(messages))
        body = written.split("[TOOL_RESULTS] ", 1)[1].removesuffix("[/TOOL_RESULTS]")
        assert json.loads(body)["content"] == content


def test_text_that_cannot_be_encoded_in_a_tool_is_a_refusal() -> None:
    ours = chat_format("mistral-v3", load_tokenizer(mistral_file("v3")))
    with pytest.raises(InvalidMessagesError, match="surrogate"):
        ours.encode([user("x")], [Tool(name="a", description="\ud800", parameters="{}")])
