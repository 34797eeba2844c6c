import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixfleet_broker.messages import ToolCall
from mixfleet_broker.tool_call_text import (
    ArgumentsPiece,
    CallFinished,
    CallStarted,
    ParsedToolCalls,
    ToolCallEvent,
    ToolCallParser,
    parse_tool_calls,
    tool_call_id,
)

JOB = "0" * 32
FIRST, SECOND = tool_call_id(JOB, 0), tool_call_id(JOB, 1)


def a_call(name: str, arguments: str, index: int = 0) -> ToolCall:
    return ToolCall(call_id=tool_call_id(JOB, index), name=name, arguments=arguments)


def in_pieces(text: str, cuts: list[int]) -> tuple[list[ToolCallEvent], ParsedToolCalls]:
    """Return what a parser tells of ``text`` that is cut at these places."""
    parser = ToolCallParser(JOB)
    events: list[ToolCallEvent] = []
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in pairwise(places):
        events += parser.push(text[start:end])
    return events, parser.parsed()


def joined(events: list[ToolCallEvent]) -> list[ToolCallEvent]:
    """Return the events with neighbouring pieces of arguments in one."""
    found: list[ToolCallEvent] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, ArgumentsPiece) and isinstance(last, ArgumentsPiece):
            assert event.index == last.index
            found[-1] = ArgumentsPiece(index=event.index, text=last.text + event.text)
        else:
            found.append(event)
    return found


# --- whole documents ----------------------------------------------------------------------------


def test_what_models_write_is_read() -> None:
    text = '[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now"}]'
    assert parse_tool_calls(JOB, text) == ParsedToolCalls(
        calls=(a_call("get_weather", '{"city": "Paris"}'), a_call("now", "{}", 1))
    )


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser(JOB)
    assert parser.push('[{"name": "f", "arguments": {"a') == [
        CallStarted(index=0, call_id=FIRST, name="f"),
        ArgumentsPiece(index=0, text='{"a'),
    ]
    assert parser.push("") == []
    assert parser.push('":\n 1.50}') == [ArgumentsPiece(index=0, text='":\n 1.50}')]
    assert parser.push("}") == [CallFinished(index=0)]
    assert parser.push(',{"name":"g') == []
    assert parser.push('"}]') == [
        CallStarted(index=1, call_id=SECOND, name="g"),
        ArgumentsPiece(index=1, text="{}"),
        CallFinished(index=1),
    ]
    assert parser.parsed().problem is None


def test_arguments_before_the_name_wait_for_it() -> None:
    parser = ToolCallParser(JOB)
    assert parser.push('[{"arguments": {"a": 1}, "id": 7, "name": ') == []
    assert parser.push('"f"}]') == [
        CallStarted(index=0, call_id=FIRST, name="f"),
        ArgumentsPiece(index=0, text='{"a": 1}'),
        CallFinished(index=0),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.text(min_size=1, max_size=8)
other_keys = st.text(max_size=5).filter(lambda key: key not in ("name", "arguments"))


@st.composite
def documents(draw: st.DrawFn) -> str:
    """A list of calls, its keys in any order, with any spaces and others among them."""
    calls: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(0, 3))):
        call: dict[str, Any] = draw(st.dictionaries(other_keys, json_values, max_size=2))
        call["name"] = draw(names)
        call["arguments"] = draw(st.dictionaries(st.text(max_size=5), json_values, max_size=3))
        calls.append({key: call[key] for key in draw(st.permutations(list(call)))})
    return json.dumps(
        calls,
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1, "\t"])),
        separators=draw(st.sampled_from([None, (",", ":"), (" ,\n", "\r : ")])),
    )


cuts = st.lists(st.integers(0, 10_000), max_size=8)


@settings(max_examples=300, deadline=None)
@given(text=documents(), cuts=cuts)
def test_any_document_cut_anywhere_gives_the_calls_that_json_gives(
    text: str, cuts: list[int]
) -> None:
    events, parsed = in_pieces(text, cuts)
    expected = [(call["name"], call["arguments"]) for call in json.loads(text)]
    assert parsed.problem is None
    assert parsed.unfinished is None
    assert [(call.name, json.loads(call.arguments)) for call in parsed.calls] == expected
    assert all(call.arguments in text for call in parsed.calls)
    assert joined(events) == [event for call in parsed.calls for event in _events_of(call)]


def _events_of(call: ToolCall) -> list[ToolCallEvent]:
    index = next(i for i in range(9) if tool_call_id(JOB, i) == call.call_id)
    return [
        CallStarted(index=index, call_id=call.call_id, name=call.name),
        ArgumentsPiece(index=index, text=call.arguments),
        CallFinished(index=index),
    ]


@settings(max_examples=300, deadline=None)
@given(text=documents(), length=st.integers(0, 400), cuts=cuts)
def test_a_document_that_ends_early_keeps_what_was_whole(
    text: str, length: int, cuts: list[int]
) -> None:
    cut = text[: min(length, len(text) - 1)]
    whole = parse_tool_calls(JOB, text).calls
    events, parsed = in_pieces(cut, cuts)
    number = len(parsed.calls)
    assert parsed.calls == whole[:number]
    assert parsed.problem == f"the list of calls is cut off after {len(cut)} characters"
    if parsed.unfinished is not None:
        assert parsed.unfinished.name == whole[number].name
        assert whole[number].arguments.startswith(parsed.unfinished.arguments)
        pieces = [e.text for e in events if isinstance(e, ArgumentsPiece) and e.index == number]
        assert "".join(pieces) == parsed.unfinished.arguments
    assert len([event for event in events if isinstance(event, CallFinished)]) == number


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(alphabet='[]{}",:\\ \nanme rgutsid012.-🙂\ud800', max_size=60)
    | st.builds(
        lambda text, at, junk: text[: at % (len(text) + 1)] + junk + text[at % (len(text) + 1) :],
        documents(),
        st.integers(0, 10_000),
        st.text(max_size=3),
    ),
    cuts=cuts,
)
def test_odd_text_never_raises_and_is_read_alike_however_it_is_cut(
    text: str, cuts: list[int]
) -> None:
    events, parsed = in_pieces(text, cuts)
    assert (joined(events), parsed) == (joined(in_pieces(text, [])[0]), parse_tool_calls(JOB, text))
    for call in parsed.calls:
        assert isinstance(json.loads(call.arguments), dict)
    if parsed.problem is None:
        assert len(json.loads(text)) == len(parsed.calls)


# --- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem", "num_calls"),
    [
        ("", "cut off after 0", 0),
        ("I would call f", "not what comes at 'list', at character 1", 0),
        ('{"name": "f"}', "not what comes at 'list'", 0),
        ('["f"]', "not what comes at 'first call'", 0),
        ('[{"name": "f"}] And then', "not what comes at 'end', at character 17", 1),
        ('[{"name": "f"}, ]', "not what comes at 'call'", 1),
        ('[{"name": "f",}]', "not what comes at 'key'", 0),
        ('[{"name" "f"}]', "not what comes at 'colon'", 0),
        ('[{"name": "f" "arguments"}]', "not what comes at 'after value'", 0),
        ("[{}]", "a call without a name", 0),
        ('[{"arguments": {}}]', "a call without a name", 0),
        ('[{"name": ""}]', "a name that is no text", 0),
        ('[{"name": 7}]', "a name that is no text", 0),
        (r'[{"name": "\ud800"}]', "a name that is no text", 0),
        ('[{"name": "f", "name": "g"}]', "a second name", 0),
        ('[{"name": "f", "arguments": {}, "arguments": {}}]', "a second arguments", 0),
        ('[{"name": "f", "arguments": "{}"}]', "arguments that are no object", 0),
        ('[{"name": "f", "arguments": {"a": tru}}]', "a value that is no JSON", 0),
        ('[{"name": "f", "arguments": {"a"]}]', "a value that is no JSON", 0),
        ('[{"name": "f", "arguments": {"a": "\n"}}]', "a value that is no JSON", 0),
        ('[{"name": "f", "id": nul}]', "a value that is no JSON", 0),
        ('[{"name": "f", "id": }]', "a value that is no JSON", 0),
    ],
)
def test_what_is_malformed_is_said_and_what_was_whole_stays(
    text: str, problem: str, num_calls: int
) -> None:
    parsed = parse_tool_calls(JOB, text)
    assert parsed.problem is not None
    assert problem in parsed.problem
    assert len(parsed.calls) == num_calls


def test_nothing_is_read_after_what_is_malformed() -> None:
    parser = ToolCallParser(JOB)
    parser.push('[{"name": "f", "arguments": {"a": x}')
    problem = parser.parsed().problem
    assert parser.push('}, {"name": "g"}]') == []
    assert parser.parsed().problem == problem
    assert parser.parsed().unfinished == a_call("f", '{"a": x}')


def test_other_keys_may_be_there_twice_and_be_anything() -> None:
    text = '[{"id": null, "id": [1, {"}": "]"}], "x": -1.5e3 , "name": "f"}]'
    assert parse_tool_calls(JOB, text) == ParsedToolCalls(calls=(a_call("f", "{}"),))


def test_arguments_deeper_than_json_can_be_read_are_no_call() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    text = f'[{{"name": "f", "arguments": {{"a": {deep}}}}}]'
    parsed = parse_tool_calls(JOB, text)
    assert parsed.calls == ()
    assert parsed.problem is not None
    assert "no JSON" in parsed.problem


# --- ids ----------------------------------------------------------------------------------------


def test_ids_are_nine_letters_and_digits_and_every_reader_makes_the_same() -> None:
    ids = [tool_call_id(f"{job:032x}", index) for job in range(100) for index in range(10)]
    assert len(set(ids)) == 1000
    assert all(len(i) == 9 and i.isascii() and i.isalnum() for i in ids)
    assert tool_call_id("0" * 32, 0) == FIRST == ids[0]


def test_ids_never_change_between_releases() -> None:
    """A conversation may be read again after an upgrade."""
    assert (FIRST, SECOND) == ("inuzD8bVy", "kdElwXyu9")
