"""The lists of OpenAI's older log-probabilities."""

import pytest

from mixfleet_broker.gateway.completion_logprobs import LogprobLists, token_text
from mixfleet_broker.messages import TokenLogprob


def entry(token: bytes, *top: tuple[bytes, float]) -> TokenLogprob:
    return TokenLogprob(token=token, logprob=-1.0, top=top)


@pytest.mark.parametrize(
    ("tokens", "offsets"),
    [
        ([b"a", b"bc", b"", b"d"], [0, 1, 3, 3]),
        ([b"\xc3", b"\xa9", b"a"], [0, 0, 1]),
        ([b"\xf0\x9f", b"\x99", b"\x82!", b"."], [0, 0, 0, 2]),
        ([b"\xc3", b"a", b"b"], [0, 1, 2]),
        ([b"\xc3", b"\xc3\xa9", b"b"], [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_offsets_are_where_tokens_begin_in_the_text(
    tokens: list[bytes], offsets: list[int], at_once: bool
) -> None:
    lists = LogprobLists()
    entries = [entry(token) for token in tokens]
    pieces = [entries] if at_once else [[one] for one in entries]
    found = [offset for piece in pieces for offset in lists.take(piece)["text_offset"]]
    assert found == offsets


def test_the_chosen_token_is_among_the_most_likely_ones() -> None:
    found = LogprobLists().take([entry(b"c", (b"a", -0.1), (b"b", -0.5))])
    assert found["top_logprobs"] == [{"a": -0.1, "b": -0.5, "c": -1.0}]
    assert found["token_logprobs"] == [-1.0]


def test_a_part_of_a_character_is_shown_as_its_bytes() -> None:
    assert token_text(b"\xe2\x80") == r"bytes:\xe2\x80"
    assert token_text("é".encode()) == "é"
