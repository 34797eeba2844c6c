"""The grammar of a job, judged by the texts that the engine would let pass."""

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from mixfleet_broker.messages import ChatJob, ChatMessage, OutputFormat, Role, ToolSpec
from mixfleet_engine.errors import InvalidRequestError
from mixfleet_engine.grammar import Grammars
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer
from mixfleet_worker.output_grammar import MAX_CALLS, MAX_PROPERTIES, output_grammar
from support.byte_tokenizer import ByteTokenizer
from support.engine_requests import make_request
from support.tokenizer_files import mistral_file

BYTES = ByteTokenizer()
SPACED = ByteTokenizer(adds_leading_space=True)
V3 = load_tokenizer(mistral_file("v3"))
TOOL_CALLS = V3.control_id("[TOOL_CALLS]") or 0
JSON_OBJECT = OutputFormat(kind="json_object")
WEATHER = ToolSpec(
    name="get_current_weather",
    parameters=json.dumps(
        {
            "$defs": {"city": {"enum": ["Paris", "Rome"]}},
            "type": "object",
            "properties": {"location": {"$ref": "#/$defs/city"}},
            "required": ["location"],
            "additionalProperties": False,
        }
    ),
)
CLOCK = ToolSpec(name="clock-2")
WEATHER_CALL = '{"name": "get_current_weather", "arguments": {"location": "Paris"}}'
CLOCK_CALL = '{"name": "clock-2", "arguments": {}}'


def a_job(*, role: Role = "user", **fields: Any) -> ChatJob:
    messages = (ChatMessage(role=role, content="Hi"),)
    return ChatJob(job_id="job1", model="tiny", messages=messages, **fields)


def schema_job(schema: object) -> ChatJob:
    return a_job(output_format=OutputFormat(kind="json_schema", schema=json.dumps(schema)))


def fits(job: ChatJob, answer: str | Sequence[int], tokenizer: Tokenizer = BYTES) -> bool:
    """Whether ``answer`` is a whole answer to ``job``; text is spelled byte by byte."""
    grammar = output_grammar(job, tokenizer)
    assert grammar is not None
    token_ids = list(answer.encode()) if isinstance(answer, str) else list(answer)
    request = make_request(output=token_ids, max_tokens=10_000, grammar=grammar)
    # Whether the grammar itself is good: of an answer that does not fit, the next call says so.
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    grammars.start(make_request(grammar=grammar))
    try:
        return grammars.start(request).may_end
    except InvalidRequestError:
        return False


def called(calls: str, before: Sequence[int] = (TOOL_CALLS,)) -> list[int]:
    """The tokens of calls as the model writes them."""
    return [*before, *V3.encode(calls)]


def test_a_job_that_asks_for_no_form_has_no_grammar() -> None:
    assert output_grammar(a_job(), BYTES) is None
    assert output_grammar(a_job(tools=(WEATHER,)), V3) is None
    assert output_grammar(a_job(tools=(WEATHER,), tool_choice="none"), V3) is None


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ("{}", True),
        ('{"a": [1, {"b": null}], "c": "é\\n"}', True),
        ('{"a": 1', False),
        ("[]", False),
        ('{"a":1}', False),
        ('{"a":  1}', False),
        ("{ }", False),
        ("{}\n", False),
        (" {}", False),
    ],
)
def test_a_json_object_is_written_in_one_way(answer: str, good: bool) -> None:
    assert fits(a_job(output_format=JSON_OBJECT), answer) is good
    if good:
        assert json.dumps(json.loads(answer), ensure_ascii=False) == answer


def test_where_the_tokenizer_puts_a_space_before_text_one_may_be_there() -> None:
    job = a_job(output_format=JSON_OBJECT)
    assert [fits(job, text, SPACED) for text in ("{}", " {}", "  {}")] == [True, True, False]


def test_the_answer_follows_the_schema_and_its_references() -> None:
    schema = {"type": "array", "items": {"$ref": "#/$defs/n"}, "$defs": {"n": {"enum": [1, 2]}}}
    job = schema_job(schema)
    assert [fits(job, text) for text in ("[1, 2]", "[3]", "[1,2]")] == [True, False, False]


def test_required_tools_are_called_as_mistral_writes_calls() -> None:
    job = a_job(tools=(WEATHER, CLOCK), tool_choice="required")
    for calls in (f"[{WEATHER_CALL}]", f"[{CLOCK_CALL}, {WEATHER_CALL}]"):
        assert fits(job, called(calls), V3)
        assert not fits(job, called(calls, before=()), V3)
    bad = (
        "[]",
        WEATHER_CALL,
        f"[{WEATHER_CALL.replace('Paris', 'Berlin')}]",
        f"[{CLOCK_CALL.replace('clock-2', 'clock')}]",
        '[{"arguments": {}, "name": "clock-2"}]',
        f"[{CLOCK_CALL},{CLOCK_CALL}]",
    )
    assert not any(fits(job, called(calls), V3) for calls in bad)


def test_calls_do_not_go_on_for_ever() -> None:
    job = a_job(tools=(CLOCK,), tool_choice="required")
    for number, good in ((MAX_CALLS, True), (MAX_CALLS + 1, False)):
        assert fits(job, called(f"[{', '.join([CLOCK_CALL] * number)}]"), V3) is good


def test_a_named_tool_is_called_once_and_no_other_is() -> None:
    job = a_job(tools=(WEATHER, CLOCK), tool_choice="=clock-2")
    assert fits(job, called(f"[{CLOCK_CALL}]"), V3)
    assert not fits(job, called(f"[{CLOCK_CALL}, {CLOCK_CALL}]"), V3)
    assert not fits(job, called(f"[{WEATHER_CALL}]"), V3)


def test_a_format_beside_tools_leaves_the_choice_to_the_model() -> None:
    job = a_job(tools=(CLOCK,), output_format=JSON_OBJECT)
    assert fits(job, V3.encode('{"a": 1}'), V3)
    assert fits(job, called(f"[{CLOCK_CALL}]"), V3)
    assert not fits(job, V3.encode("Hello"), V3)
    none = a_job(tools=(CLOCK,), tool_choice="none", output_format=JSON_OBJECT)
    assert not fits(none, called(f"[{CLOCK_CALL}]"), V3)


def test_a_model_without_the_control_token_cannot_be_made_to_call() -> None:
    with pytest.raises(InvalidRequestError, match=r"no \[TOOL_CALLS\]"):
        output_grammar(a_job(tools=(CLOCK,), tool_choice="required"), BYTES)


def test_an_answer_that_has_begun_is_given_no_form() -> None:
    with pytest.raises(InvalidRequestError, match="last message is the assistant's"):
        output_grammar(a_job(role="assistant", output_format=JSON_OBJECT), BYTES)
    prompt = ChatJob(job_id="job1", model="tiny", prompt="x = ", output_format=JSON_OBJECT)
    assert fits(prompt, "{}")


def test_a_schema_cannot_change_how_json_is_written() -> None:
    with pytest.raises(InvalidRequestError, match="x-guidance is not a keyword"):
        output_grammar(schema_job({"x-guidance": {"lenient": True}}), BYTES)
    nested = {"properties": {"a": {"x-guidance": {"whitespace_flexible": True}}}}
    assert not fits(schema_job(nested), '{"a":  1}')


@pytest.mark.parametrize(
    "schema",
    [
        {"multipleOf": 999_983},
        {"multipleOf": 99_999.9},
        {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
        {"items": [{"multipleOf": 10**300}, {"multipleOf": 10**300 - 1}]},
        {"anyOf": [{"properties": {f"p{i}{j}": {} for i in range(300)}} for j in "ab"]},
    ],
)
def test_a_schema_that_costs_too_much_is_refused_before_it_costs(schema: object) -> None:
    begun = time.perf_counter()
    with pytest.raises(InvalidRequestError, match=r"properties|multipleOf"):
        output_grammar(schema_job(schema), BYTES)
    assert time.perf_counter() - begun < 0.1


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{i}": {"multipleOf": n} for i, n in enumerate((0.01, 5, 60, 3600))}},
        {"properties": {f"p{i}": True for i in range(MAX_PROPERTIES)}},
        {"properties": {"multipleOf": {"type": "string"}, "properties": {"type": "null"}}},
    ],
)
def test_an_ordinary_schema_is_not_refused(schema: object) -> None:
    assert fits(schema_job(schema), "{}")
