import pytest

from mixfleet_engine.chat_format import chat_format, default_format
from mixfleet_worker.simulated_words import CONTROLS, SimulatedWords

WORDS = SimulatedWords()


@pytest.mark.parametrize("text", ["", " ", "naïve 🙂", "</s><|im_end|>"])
def test_text_becomes_its_bytes_and_never_a_control_token(text: str) -> None:
    token_ids = WORDS.encode(text)
    assert b"".join(map(WORDS.token_bytes, token_ids)) == text.encode()
    assert not WORDS.control_ids & set(token_ids)


def test_every_token_is_a_byte_a_word_or_a_control_token() -> None:
    kinds = [range(256), WORDS.word_ids, WORDS.control_ids]
    assert sorted(token_id for kind in kinds for token_id in kind) == list(range(WORDS.vocab_size))


def test_words_come_with_the_space_before_them() -> None:
    texts = [WORDS.token_bytes(token_id).decode() for token_id in WORDS.word_ids]
    assert len(set(texts)) == len(texts)
    assert all(text == f" {text.strip()}" for text in texts)


def test_control_tokens_have_names_and_no_text() -> None:
    ids = [WORDS.control_id(name) for name in CONTROLS]
    assert set(ids) == WORDS.control_ids
    assert [WORDS.id_to_piece(i) for i in sorted(WORDS.control_ids)] == list(CONTROLS)
    assert {WORDS.token_bytes(token_id) for token_id in WORDS.control_ids} == {b""}
    assert WORDS.control_id("[INST]") is None


def test_pieces_are_spelled_as_vocabularies_do() -> None:
    assert WORDS.id_to_piece(10) == "<0x0A>"
    assert WORDS.id_to_piece(WORDS.word_ids[0]) == "▁a"


def test_its_chat_format_is_chatml() -> None:
    assert default_format(WORDS) == "chatml"
    assert chat_format("chatml", WORDS).stop_token_ids <= WORDS.control_ids


def test_half_of_a_surrogate_pair_does_no_harm() -> None:
    assert WORDS.encode("\ud83d") == [ord("?")]
