"""Answers that follow a schema, through everything that a scheduler does to a request."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jsonschema
import pytest

from mixfleet_engine.engine import Engine
from mixfleet_engine.errors import InvalidRequestError
from mixfleet_engine.grammar import Grammars
from mixfleet_engine.request import GenerateRequest, SamplingParams
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer
from support.byte_tokenizer import ByteTokenizer
from support.engine_requests import Answers, make_request, run_to_end, step_into
from support.random_logits import RandomLogitsRunner
from support.tokenizer_files import mistral_file, write_byte_fallback_json, write_byte_level_json

BYTES = ByteTokenizer()
EOS = 257
WARM = SamplingParams(temperature=1.3, top_p=0.98, seed=3, repetition_penalty=1.05, min_p=1e-4)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "ccc"]}, "maxItems": 4},
        "mail": {"type": ["null", "boolean"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number", "multipleOf": 0.5, "minimum": -9, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    "person": PERSON,
    "tree": TREE,
    "date": {"type": "string", "format": "date"},
    "pattern": {"type": "string", "pattern": "^[a-f]{3}-[0-9]+$", "maxLength": 12},
    "pair": {
        "type": "array",
        "prefixItems": [{"const": "é"}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "words": {
        "type": "object",
        "additionalProperties": {"type": "string", "minLength": 1, "maxLength": 5},
        "minProperties": 1,
        "maxProperties": 2,
    },
    "object": {"type": "object"},
}


def rule(schema: Mapping[str, Any]) -> str:
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return f"start: %json {json.dumps({'x-guidance': spacing, **schema})}"


def engine_of(tokenizer: Tokenizer = BYTES, *, pipelined: bool = False, **changes: Any) -> Engine:
    sizes = {"num_blocks": 400, "block_size": 4, **changes}
    vocab_size = tokenizer.vocab_size + 3
    runner = RandomLogitsRunner(
        num_blocks=sizes["num_blocks"],
        block_size=sizes["block_size"],
        vocab_size=vocab_size,
        tokenizer=tokenizer,
    )
    settings = {"max_batch_size": 12, "max_step_tokens": 24, "context_length": 500, **sizes}
    grammars = Grammars(tokenizer, vocab_size)
    scheduler = Scheduler(vocab_size=vocab_size, grammars=grammars, itl_target_s=10.0, **settings)
    return Engine(runner, scheduler, pipelined=pipelined)


def requests(
    tokenizer: Tokenizer = BYTES, *, max_tokens: int = 150, variants: int = 1
) -> list[GenerateRequest]:
    """One per schema, cold and warm in turns, and as many without a grammar."""
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    found = []
    for number, (name, schema) in enumerate(SCHEMAS.items()):
        for variant in range(variants):
            prompt = range(1, 4 + 5 * number + variant)
            sampling = WARM if (number + variant) % 2 else SamplingParams()
            free = make_request(
                f"free {name} {variant}", prompt=prompt, max_tokens=70, sampling=sampling
            )
            bound = make_request(
                f"{name} {variant}",
                prompt=prompt,
                max_tokens=max_tokens,
                stops=eos,
                sampling=sampling,
                grammar=rule(schema),
            )
            found += [bound, free]
    return found


def text_of(tokenizer: Tokenizer, token_ids: Iterable[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, token_ids)).decode()


def assert_valid(answers: Answers, tokenizer: Tokenizer = BYTES) -> int:
    """Check every whole answer and return how many there are."""
    whole = 0
    for request_id, (token_ids, reason) in answers.items():
        if request_id.startswith("free"):
            continue
        assert reason in ("stop", "length")
        if reason == "stop":
            value = json.loads(text_of(tokenizer, token_ids))
            schema = SCHEMAS[request_id.split()[0]]
            jsonschema.Draft202012Validator(schema).validate(value)
            whole += 1
    return whole


def test_whole_answers_are_of_their_schema() -> None:
    wanted = requests(variants=6)
    answers = run_to_end(engine_of(), wanted)
    assert assert_valid(answers) > len(wanted) / 2 * 0.8


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_whole_answers_of_real_vocabularies_are_of_their_schema(version: str) -> None:
    tokenizer = load_tokenizer(mistral_file(version))
    answers = run_to_end(engine_of(tokenizer), requests(tokenizer, max_tokens=60))
    assert assert_valid(answers, tokenizer) >= len(SCHEMAS) - 2


@pytest.mark.parametrize("write", [write_byte_level_json, write_byte_fallback_json])
def test_whole_answers_of_tokenizer_json_are_of_their_schema(write: Any, tmp_path: Any) -> None:
    write(tmp_path, eos_token="<|im_end|>" if write is write_byte_level_json else "</s>")
    tokenizer = load_tokenizer(tmp_path)
    answers = run_to_end(engine_of(tokenizer), requests(tokenizer))
    assert assert_valid(answers, tokenizer) >= len(SCHEMAS) - 2


@pytest.mark.parametrize("pipelined", [False, True])
def test_neighbours_chunks_preemptions_and_prefix_hits_change_nothing(*, pipelined: bool) -> None:
    wanted = requests()
    alone: Answers = {}
    for request in wanted:
        alone |= run_to_end(engine_of(prefix_cache=False), [request])
    small: dict[str, Any] = {"num_blocks": 50, "context_length": 200}
    changed: tuple[dict[str, Any], ...] = ({}, small, {"max_step_tokens": 12})
    for changes in changed:
        engine = engine_of(pipelined=pipelined, **changes)
        assert run_to_end(engine, wanted) == alone
        assert (engine.num_preemptions > 0) == ("num_blocks" in changes)
        assert run_to_end(engine, wanted) == alone
        assert engine.prefix_hit_tokens > 0


def test_an_answer_goes_on_in_another_engine_from_any_token() -> None:
    request = next(r for r in requests() if r.request_id == "person 0")
    full, reason = run_to_end(engine_of(), [request])[request.request_id]
    assert reason == "stop"
    for length in range(1, len(full) + 1):
        begun = make_request(
            "person 0",
            prompt=request.prompt_token_ids,
            output=full[:length],
            max_tokens=request.max_tokens,
            stops=request.stop_token_ids,
            sampling=request.sampling,
            grammar=request.grammar,
        )
        rest = run_to_end(engine_of(), [begun])["person 0"]
        assert rest == (full[length:], "stop")


def test_requests_without_a_grammar_get_the_tokens_of_an_engine_that_knows_none() -> None:
    wanted = [r for r in requests() if r.grammar is None]
    both = run_to_end(engine_of(), requests())
    assert {r.request_id: both[r.request_id] for r in wanted} == run_to_end(engine_of(), wanted)


def test_an_answer_ends_with_the_last_token_that_its_grammar_has_room_for() -> None:
    engine = engine_of()
    fixed = make_request("fixed", max_tokens=3, stops=[EOS], grammar='start: "abc"')
    longer = make_request("longer", max_tokens=2, stops=[EOS], grammar='start: "abc"')
    free = make_request("free", max_tokens=9, grammar="start: /a{2,4}/")
    answers = run_to_end(engine, [fixed, longer, free])
    assert answers["fixed"] == (tuple(b"abc"), "stop")
    assert answers["longer"] == (tuple(b"ab"), "length")
    assert answers["free"] == (tuple(b"aaaa"), "stop"), (
        "without stop tokens it goes on while it may"
    )


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_failed_step_leaves_the_answer_where_it_was(*, pipelined: bool) -> None:
    wanted = requests()
    expected = run_to_end(engine_of(), wanted)
    engine = engine_of(pipelined=pipelined)
    for request in wanted:
        engine.submit(request)
    answers: Answers = {}
    for _ in range(5):
        step_into(answers, engine)
    runner = engine._runner
    assert isinstance(runner, RandomLogitsRunner)
    runner.failing_reads = 1
    with pytest.raises(RuntimeError):
        engine.step()
    while engine.has_work:
        step_into(answers, engine)
    assert answers == expected


def test_an_aborted_request_takes_its_grammar_with_it() -> None:
    engine = engine_of()
    request = make_request("r", max_tokens=20, grammar='start: "abcdef"')
    engine.submit(request)
    engine.step()
    assert engine.abort("r")
    assert run_to_end(engine, [request])["r"] == (tuple(b"abcdef"), "stop")


def test_a_grammar_that_cannot_go_on_ends_its_request_alone() -> None:
    properties = {f"p{i}": {"type": "integer"} for i in range(1500)}
    schema = {"properties": properties, "type": "object", "required": ["p1499"]}
    lost = make_request("lost", max_tokens=50, stops=[EOS], grammar=rule(schema))
    wanted = [*requests(), lost]
    answers = run_to_end(engine_of(), wanted)
    assert answers.pop("lost")[1] == "grammar"
    assert answers == run_to_end(engine_of(), requests())


def test_numbers_that_are_not_finite_are_found_out_behind_a_mask() -> None:
    engine = engine_of()
    runner = engine._runner
    assert isinstance(runner, RandomLogitsRunner)
    runner.poison = {2}
    answers = run_to_end(engine, [make_request("r", grammar='start: "abc"')])
    assert answers["r"] == ((), "error")


def test_a_refused_grammar_leaves_nothing_behind() -> None:
    engine = engine_of()
    with pytest.raises(InvalidRequestError, match="Unimplemented keys"):
        engine.submit(make_request("r", grammar=rule({"not": {}})))
    assert not engine.has_work
    run_to_end(engine, [make_request("r", grammar='start: "abc"')])


def test_an_engine_without_a_tokenizer_refuses_every_grammar() -> None:
    scheduler = Scheduler(
        num_blocks=8,
        block_size=4,
        max_batch_size=1,
        max_step_tokens=8,
        context_length=32,
        vocab_size=300,
    )
    with pytest.raises(InvalidRequestError, match="without a tokenizer"):
        scheduler.submit(make_request(grammar='start: "a"'))
