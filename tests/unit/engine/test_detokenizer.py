import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mixfleet_engine.detokenizer import AnswerText, Detokenizer, StopStringFilter, TextPiece
from mixfleet_engine.errors import InvalidRequestError
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer
from support.byte_tokenizer import ByteTokenizer
from support.tokenizer_files import mistral_file, write_byte_level_json

BYTES = ByteTokenizer()
# Few letters, so that stop strings overlap themselves, each other and the text.
few_letters = st.text(alphabet="abñ", max_size=12)
any_text = st.lists(
    st.integers(0, 0x10FFFF).filter(lambda code: not 0xD800 <= code < 0xE000).map(chr), max_size=20
).map("".join)
stop_lists = st.lists(st.text(alphabet="abñ", min_size=1, max_size=4), max_size=4)


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return load_tokenizer(mistral_file("v1"))


def detokenize(tokenizer: Tokenizer, ids: Sequence[int], *, continues: bool = False) -> str:
    detokenizer = Detokenizer(tokenizer, continues=continues)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


def shown_by(answer: AnswerText, ids: Sequence[int]) -> tuple[str, bool]:
    text = ""
    for token_id in ids:
        piece = answer.push(token_id)
        text += piece.text
        if piece.stopped:
            return text + answer.finish(), True
    return text + answer.finish(), False


def cut_at_first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The slow obvious way: look for a stop string at the end of every beginning of the text."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@given(data=st.binary(max_size=24))
def test_bytes_one_by_one_give_the_text_of_all_at_once(data: bytes) -> None:
    assert detokenize(BYTES, list(data)) == data.decode("utf-8", "replace")


@given(text=any_text)
def test_no_piece_ever_holds_a_part_of_a_character(text: str) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(value) for value in text.encode()]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)
    assert detokenizer.flush() == ""


def test_an_incomplete_character_waits_and_becomes_a_replacement_at_the_end() -> None:
    detokenizer = Detokenizer(BYTES)
    assert [detokenizer.push(value) for value in "🙂".encode()[:3]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_a_control_token_between_two_halves_of_a_character_adds_nothing() -> None:
    first, second = "é".encode()
    assert detokenize(BYTES, [first, 257, second]) == "é"


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_random_tokens_give_the_text_of_sentencepiece(version: str) -> None:
    oracle: Any = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file(version)))
    tokenizer = load_tokenizer(mistral_file(version))
    # Byte pieces may form invalid UTF-8, for which the oracle has its own rule.
    usable = [
        token_id
        for token_id in range(tokenizer.vocab_size)
        if not oracle.is_byte(token_id)
        and (token_id not in tokenizer.control_ids or oracle.is_control(token_id))
    ]
    rng = random.Random(0)
    for length in range(1, 100):
        ids = rng.choices(usable, k=length)
        assert detokenize(tokenizer, ids) == oracle.decode(ids)


def test_byte_pieces_join_to_characters(v1: Tokenizer) -> None:
    text = "x 𓂀 \u0378 end"
    ids = v1.encode(text)
    assert any(v1.id_to_piece(token_id).startswith("<0x") for token_id in ids)
    detokenizer = Detokenizer(v1)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("text", ["Paris.", " two", "  three", "\n", " ", "a  b"])
def test_the_space_that_sentencepiece_adds_is_left_out_once(text: str, v1: Tokenizer) -> None:
    assert detokenize(v1, v1.encode(text)) == text


def test_the_first_space_counts_in_the_middle_of_a_text(v1: Tokenizer) -> None:
    assert detokenize(v1, v1.encode("Paris."), continues=True) == " Paris."


def test_an_answer_may_begin_without_a_space(v1: Tokenizer) -> None:
    [token_id] = [i for i in range(v1.vocab_size) if v1.id_to_piece(i) == "INST"]
    assert detokenize(v1, [token_id, *v1.encode("x")]) == "INST x"


def test_control_tokens_do_not_use_up_the_first_space(v1: Tokenizer) -> None:
    assert detokenize(v1, [1, *v1.encode("Paris.")]) == "Paris."


def test_byte_level_tokens_keep_their_first_space(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_byte_level_json(tmp_path))
    for text in (" lazy dog", "the 🙂 dog", "\ufffd kept"):
        assert detokenize(tokenizer, tokenizer.encode(text)) == text


@settings(max_examples=300)
@given(text=few_letters, stops=stop_lists, cuts=st.lists(st.integers(0, 12), max_size=5))
def test_stop_strings_are_found_wherever_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stop_filter = StopStringFilter(stops)
    shown, stopped = "", False
    for start, end in pairwise(bounds):
        new, stopped = stop_filter.push(text[start:end])
        shown += new
    assert (shown + stop_filter.flush(), stopped) == cut_at_first_stop(text, stops)


@settings(max_examples=300)
@given(text=few_letters, stops=stop_lists)
def test_nothing_is_shown_that_could_still_be_a_stop_and_nothing_else_is_held(
    text: str, stops: list[str]
) -> None:
    stop_filter = StopStringFilter(stops)
    shown = ""
    for end in range(1, len(text) + 1):
        new, stopped = stop_filter.push(text[end - 1])
        shown += new
        if stopped:
            return
        held = text[len(shown) : end]
        possible = [
            k for k in range(end + 1) if any(s.startswith(text[end - k : end]) for s in stops)
        ]
        assert len(held) == max(possible, default=0)


def test_nothing_is_shown_after_a_stop_string() -> None:
    stop_filter = StopStringFilter(["END"])
    assert stop_filter.push("a EN") == ("a ", False)
    assert stop_filter.push("D b") == ("", True)
    assert stop_filter.push("c") == ("", True)
    assert stop_filter.flush() == ""


@pytest.mark.parametrize(
    ("stops", "text", "found"),
    [
        (["b", "d"], "abcd", "b"),
        (["c", "abc", "bc"], "abc", "abc"),  # the longest that is complete at that character
        (["abd"], "abc", None),
        ([], "abc", None),
    ],
)
def test_the_stop_string_that_was_found_is_told(
    stops: list[str], text: str, found: str | None
) -> None:
    answer = AnswerText(BYTES, stops)
    for token_id in text.encode():
        answer.push(token_id)
    assert answer.stop_string == found


def test_what_was_held_back_is_shown_when_it_is_no_stop_string() -> None:
    stop_filter = StopStringFilter(["\n\nUser:"])
    assert stop_filter.push("yes\n") == ("yes", False)
    assert stop_filter.push("\nUse") == ("", False)
    assert stop_filter.push("ful") == ("\n\nUseful", False)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="stop string 1 is empty"):
        StopStringFilter(["a", ""])


@settings(max_examples=200)
@given(text=few_letters, stops=stop_lists)
def test_an_answer_is_its_text_up_to_the_first_stop_string(text: str, stops: list[str]) -> None:
    ids = list(text.encode())
    assert shown_by(AnswerText(BYTES, stops), ids) == cut_at_first_stop(text, stops)


@given(data=st.binary(max_size=16), stops=stop_lists, at=st.integers(0, 16))
def test_replaying_the_delivered_tokens_restores_the_state(
    data: bytes, stops: list[str], at: int
) -> None:
    def run(answer: AnswerText, ids: bytes) -> list[TextPiece]:
        return [answer.push(token_id) for token_id in ids]

    first, second = AnswerText(BYTES, stops), AnswerText(BYTES, stops)
    delivered = run(first, data[:at])
    assert run(second, data[:at]) == delivered
    assert run(first, data[at:]) == run(second, data[at:])
    assert first.finish() == second.finish()


def test_a_stop_string_may_end_in_the_middle_of_a_token(v1: Tokenizer) -> None:
    ids = v1.encode("one two three")
    assert shown_by(AnswerText(v1, ["wo t"]), ids) == ("one t", True)


def test_an_incomplete_character_at_the_end_comes_after_what_was_held() -> None:
    answer = AnswerText(BYTES, ["ab"])
    assert answer.push(ord("a")) == TextPiece(text="", stopped=False)
    assert answer.push(0xC3) == TextPiece(text="", stopped=False)
    assert answer.finish() == "a\ufffd"


def test_time_per_token_does_not_grow_with_the_answer() -> None:
    """Counted in bytes looked up, not in seconds: each token is read once."""

    class Counting(ByteTokenizer):
        calls = 0

        def token_bytes(self, token_id: int) -> bytes:
            self.calls += 1
            return super().token_bytes(token_id)

    tokenizer = Counting()
    answer = AnswerText(tokenizer, ["aaab"])
    for _ in range(1000):
        answer.push(ord("a"))
    assert tokenizer.calls == 1000
