"""Masks against slow oracles: a trial of every token, and the list of all texts that fit."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any, cast

import pytest

from mixfleet_engine.errors import InvalidRequestError
from mixfleet_engine.grammar import MAX_GRAMMAR, Grammars, GrammarState
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer
from support.byte_tokenizer import ByteTokenizer
from support.engine_requests import make_request
from support.tokenizer_files import mistral_file

BYTES = ByteTokenizer()
EOS = 257
TEXTS = ("red", "redder", "grün", "a b [INST]")
JSON = '%json {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x"]}}}'


@pytest.fixture(scope="module", params=["v1", "v3"])
def mistral(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(mistral_file(request.param))


def one_of(texts: Iterable[str]) -> str:
    return f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}"


@cache
def grammars(tokenizer: Any, vocab_size: int) -> Grammars:
    return Grammars(tokenizer, vocab_size)


def started(
    tokenizer: Tokenizer,
    grammar: str,
    output: Iterable[int] = (),
    *,
    stops: Iterable[int] | None = None,
    vocab_size: int | None = None,
) -> GrammarState:
    if stops is None:
        stops = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    request = make_request(output=output, stops=stops, max_tokens=10_000, grammar=grammar)
    found = grammars(cast("Any", tokenizer), vocab_size or tokenizer.vocab_size)
    return found.start(request)


def tokens_in(state: GrammarState) -> set[int]:
    mask = state.allowed(state.num_tokens)
    return {i for i in range(8 * len(mask)) if mask[i // 8] >> (i % 8) & 1}


def test_a_mask_holds_all_tokens_that_lead_to_a_fitting_text(mistral: Tokenizer) -> None:
    """Every piece, also several of one spelling, on a random walk through each text."""
    generator = random.Random(0)
    for text in TEXTS:
        state = started(mistral, one_of(TEXTS))
        said = b""
        while not state.is_complete:
            rest = [t.encode()[len(said) :] for t in TEXTS if t.encode().startswith(said)]
            expected = {
                token_id
                for token_id in range(mistral.vocab_size)
                if (new := mistral.token_bytes(token_id)) and any(r.startswith(new) for r in rest)
            }
            if b"" in rest:
                expected.add(mistral.eos_id or 0)
            assert tokens_in(state) == expected
            wanted = text.encode()[len(said) :]
            fitting = [i for i in expected if wanted.startswith(mistral.token_bytes(i) or b"\0")]
            if not fitting:
                break  # the text is said, and a longer one could follow
            token_id = generator.choice(sorted(fitting))
            said += mistral.token_bytes(token_id)
            state.advance(token_id)
        assert said == text.encode()
        assert state.may_end


def test_a_mask_holds_exactly_the_tokens_that_a_trial_accepts() -> None:
    answer = list(b'{"a": -1}')
    for length in range(len(answer) + 1):
        allowed = set()
        for token_id in range(BYTES.vocab_size):
            try:
                started(BYTES, f"start: {JSON}", [*answer[:length], token_id], stops=())
            except InvalidRequestError:
                continue
            allowed.add(token_id)
        state = started(BYTES, f"start: {JSON}", answer[:length], stops=())
        # Once it is complete, llguidance would still take its own end-of-text token.
        assert tokens_in(state) == allowed - {EOS}


def test_an_answer_may_end_exactly_where_its_grammar_may() -> None:
    state = started(BYTES, "start: /[0-9]{2,3}/", stops=(EOS, 261))
    for digits, may_end in ((b"1", False), (b"2", True), (b"3", True)):
        assert {EOS, 261} & tokens_in(state) == set()
        state.advance(digits[0])
        assert state.may_end is may_end
        if may_end:
            break
    assert {EOS, 261} <= tokens_in(state)
    assert not state.is_complete
    state.advance(ord("3"))
    assert state.is_complete


def test_without_stop_tokens_the_model_cannot_end_an_answer_that_may_go_on() -> None:
    state = started(BYTES, "start: /[0-9]+/", b"1", stops=())
    assert tokens_in(state) == set(b"0123456789")


def test_a_control_token_is_allowed_where_the_grammar_names_it_and_its_text_never_is(
    mistral: Tokenizer,
) -> None:
    token_id = mistral.control_id("</s>") or 0
    state = started(mistral, f'start: "x" <[{token_id}]> "y"', stops=())
    text = {i for i in range(mistral.vocab_size) if mistral.token_bytes(i) == b"x"}
    assert tokens_in(state) == text
    inst = mistral.control_id("[INST]")
    if inst is not None:
        assert tokens_in(started(mistral, f'start: <[{inst}]> "y"')) == {inst}
        spelled = {mistral.token_bytes(i) for i in tokens_in(started(mistral, one_of(["[INST]"])))}
        assert spelled <= {b"[", b"[I", b"[IN", b"[INST", b"[INST]"}
        assert b"[" in spelled


def test_padding_rows_of_the_model_are_never_allowed() -> None:
    state = started(BYTES, "start: /(.|\\n)*/", vocab_size=301)
    assert max(tokens_in(state)) == EOS


def test_the_state_after_a_part_of_the_answer_is_that_of_one_that_said_it_itself() -> None:
    answer = list(b'{"a": 5, "b": "x"}')
    walked = started(BYTES, f"start: {JSON}")
    for length, token_id in enumerate(answer):
        assert tokens_in(started(BYTES, f"start: {JSON}", answer[:length])) == tokens_in(walked)
        walked.advance(token_id)
    assert started(BYTES, f"start: {JSON}", answer).is_complete


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: nothing", "nothing"),
        ("{}", "grammar: "),
        ('start: %json {"not": {}}', "Unimplemented keys"),
        ('start: %json {"$ref": "#"}', "no text that fits"),
        ('start: %json {"$ref": "file:///etc/passwd"}', "does not fetch"),
        ('start: %json {"minLength": 2, "maxLength": 1, "type": "string"}', "minLength"),
        ('start: %json {"type": "string", "pattern": "' + "(" * 9000 + '"}', "regex parse error"),
        ("start: " + "(" * 9000 + '"a"' + ")" * 9000, "deeply nested"),
        ("start: <NO_SUCH_TOKEN>", "unknown special token"),
        ("x" * (MAX_GRAMMAR + 1), "the limit is"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused_with_a_short_reason(
    grammar: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        started(BYTES, grammar)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{i}": {"type": "integer"} for i in range(500)}},
        {"enum": [f"a word, number {i}" for i in range(4000)]},
        {"type": "string", "pattern": "((((a{1,100}){1,100}){1,100}){1,100})"},
        {"type": "string", "pattern": "^(?:.*[a-z]){12}(?:.*x.{30})$"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**5},
        {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in "abc"]} for i in range(12)]},
        {"type": "integer", "multipleOf": 9973},
        {"type": "number", "multipleOf": 0.1234567},
    ],
)
def test_a_nasty_grammar_costs_little_whether_it_is_refused_or_not(schema: object) -> None:
    """A tenth of a second was measured as 0.02 s; the rest is for machines at work."""
    begun = time.perf_counter()
    with suppress(InvalidRequestError):
        started(BYTES, f"start: %json {json.dumps(schema)}")
    assert time.perf_counter() - begun < 0.5


def test_tokens_that_do_not_fit_are_refused_as_the_beginning_of_an_answer() -> None:
    with pytest.raises(InvalidRequestError, match=r"output_token_ids\[2\]=120 does not fit"):
        started(BYTES, one_of(["abc"]), b"abx")


def test_text_cannot_be_a_stop_token_beside_a_grammar() -> None:
    with pytest.raises(InvalidRequestError, match="holds 125, which is text"):
        started(BYTES, one_of(["abc"]), stops=(EOS, 125))


def test_a_grammar_that_grows_too_complex_leads_to_a_dead_end_and_says_so() -> None:
    schema = {"properties": {f"p{i}": {"type": "integer"} for i in range(1500)}}
    state = started(BYTES, f"start: %json {json.dumps(schema)}", stops=())
    for _ in range(10):
        allowed = tokens_in(state)
        if state.dead_end:
            break
        state.advance(ord("{") if ord("{") in allowed else min(allowed))
    assert state.dead_end == "grammar"
    assert "max is" in state.problem or "limit" in state.problem


def test_llguidance_is_imported_with_the_first_grammar_only() -> None:
    program = """
import sys
from support.byte_tokenizer import ByteTokenizer
from support.engine_requests import make_request
from mixfleet_engine.simulated import SimulatedEngine
engine = SimulatedEngine(token_ids=range(97, 120), vocab_size=262, tokenizer=ByteTokenizer())
engine.submit(make_request())
engine.step()
assert "llguidance" not in sys.modules
engine.submit(make_request("g", grammar='start: "x"'))
assert "llguidance" in sys.modules
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    path = [entry for entry in sys.path if entry]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{program}"],
        check=True,
        timeout=60,
    )
