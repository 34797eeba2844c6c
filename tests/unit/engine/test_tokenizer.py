import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from mixfleet_engine.errors import CheckpointError, InvalidRequestError
from mixfleet_engine.sentencepiece_writer import Piece, sentencepiece_model
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer, looks_like_markup
from mixfleet_engine.vocabulary import byte_characters, byte_piece
from support.byte_tokenizer import ByteTokenizer
from support.tokenizer_files import (
    MISTRAL_FILES,
    NASTY_TEXTS,
    edit_json,
    mistral_file,
    write_byte_fallback_json,
    write_byte_level_json,
)

KINDS = (*MISTRAL_FILES, "byte-level", "byte-fallback", "fake")
PLAIN_TEXTS = (
    "Hello, world!",
    " leading",
    "a\n\nb\t c",
    "naïve 漢字 🙂",
    "def f(x):\n    return x",
)


def make_tokenizer(kind: str, directory: Path) -> Tokenizer:
    if kind in MISTRAL_FILES:
        return load_tokenizer(mistral_file(kind))
    if kind == "byte-level":
        return load_tokenizer(
            write_byte_level_json(directory, eos_token="<|im_end|>", add_bos_token=False)
        )
    if kind == "byte-fallback":
        return load_tokenizer(
            write_byte_fallback_json(directory, bos_token="<s>", eos_token={"content": "</s>"})
        )
    return ByteTokenizer()


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return make_tokenizer(request.param, tmp_path)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    text = b"".join(map(tokenizer.token_bytes, ids)).decode()
    return text.removeprefix(" ") if tokenizer.adds_leading_space else text


def test_no_text_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    names = [tokenizer.id_to_piece(token_id) for token_id in tokenizer.control_ids]
    for text in (*NASTY_TEXTS, *names, *(f"a {name}b" for name in names), " ".join(names)):
        assert tokenizer.control_ids.isdisjoint(tokenizer.encode(text)), text


def test_the_text_of_a_byte_piece_is_not_that_byte(tokenizer: Tokenizer) -> None:
    assert text_of(tokenizer, tokenizer.encode("<0x0A>")) == "<0x0A>"


def test_bytes_of_encoded_text_are_the_text(tokenizer: Tokenizer) -> None:
    for text in (*NASTY_TEXTS, *PLAIN_TEXTS):
        # sentencepiece spells a space that way, so the two cannot be told apart
        expected = text.replace("▁", " ") if tokenizer.adds_leading_space else text
        assert text_of(tokenizer, tokenizer.encode(text)) == expected


def test_empty_text_has_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []


def test_encode_space_is_exactly_one_space(tokenizer: Tokenizer) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode_space())) == b" "


def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"character 2 .* U\+D83D"):
        tokenizer.encode("ab\ud83d")


def test_control_tokens_have_ids_and_no_bytes(tokenizer: Tokenizer) -> None:
    for token_id in tokenizer.control_ids:
        assert tokenizer.control_id(tokenizer.id_to_piece(token_id)) == token_id
        assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.control_id("no such token") is None
    assert tokenizer.control_id("a") is None


def test_eos_is_a_control_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id in tokenizer.control_ids


def test_padding_rows_of_the_model_have_no_text(tmp_path: Path) -> None:
    for kind in ("v1", "byte-level"):
        tokenizer = make_tokenizer(kind, tmp_path)
        assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
        assert tokenizer.id_to_piece(tokenizer.vocab_size) == ""


@pytest.mark.parametrize("version", MISTRAL_FILES)
def test_ordinary_text_has_sentencepiece_own_tokens(version: str) -> None:
    tokenizer = load_tokenizer(mistral_file(version))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file(version)))
    for text in (*PLAIN_TEXTS, *NASTY_TEXTS):
        if "REFERENCE" not in text:
            assert tokenizer.encode(text) == oracle.encode(text)
    assert tokenizer.vocab_size == oracle.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (oracle.bos_id(), oracle.eos_id())


def write_pieces(directory: Path, spellings: Sequence[str]) -> Path:
    """Write a sentencepiece model of <unk>, <s>, </s> and these pieces."""
    pieces = [
        Piece(spelling=s, score=0.0, kind=k) for s, k in (("<unk>", 2), ("<s>", 3), ("</s>", 3))
    ]
    for spelling in spellings:
        kind = 6 if spelling.startswith("<0x") else 1
        pieces.append(Piece(spelling=spelling, score=-1.0, kind=kind))
    path = directory / "tokenizer.model"
    model = sentencepiece_model(pieces, bos_id=1, eos_id=2, adds_leading_space=False)
    path.write_bytes(model)
    return path


def test_a_sentencepiece_model_without_byte_pieces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: .* byte pieces"):
        load_tokenizer(write_pieces(tmp_path, ["▁", "a"]))


def test_a_space_without_a_piece_of_its_own_is_a_byte(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_pieces(tmp_path, [*map(byte_piece, range(256)), "a"]))
    assert [tokenizer.id_to_piece(i) for i in tokenizer.encode_space()] == ["<0x20>"]


def test_a_sentencepiece_model_may_add_no_space(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_pieces(tmp_path, [*map(byte_piece, range(256)), "▁", "a"]))
    assert [tokenizer.id_to_piece(i) for i in tokenizer.encode("a a")] == ["a", "▁", "a"]
    assert not tokenizer.adds_leading_space


def test_user_defined_tags_of_v3_are_control_tokens() -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file("v3")))
    tokenizer = load_tokenizer(mistral_file("v3"))
    tag = tokenizer.control_id("[REFERENCE_DOC_19]")
    assert tag in oracle.encode("[REFERENCE_DOC_19]")
    assert tag is not None
    assert text_of(tokenizer, tokenizer.encode("[REFERENCE_DOC_19]")) == "[REFERENCE_DOC_19]"


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("[REFERENCE_DOC_1]", True),
        ("<think>", True),
        ("    ", False),
        ("[]", False),
        ("<>", False),
        ("[a", False),
        ("\n\n", False),
    ],
)
def test_markup_is_known_by_its_brackets(piece: str, expected: bool) -> None:
    assert looks_like_markup(piece) is expected


@pytest.mark.parametrize("write", [write_byte_level_json, write_byte_fallback_json])
def test_json_text_without_control_tokens_has_the_library_own_tokens(
    write: Any, tmp_path: Path
) -> None:
    path = write(tmp_path)
    oracle = tokenizers.Tokenizer.from_file(str(path))
    tokenizer = load_tokenizer(path)
    for text in (*PLAIN_TEXTS, "the system in the <0x0A> [INST]"):
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids


def test_the_library_alone_would_make_control_tokens_of_text(tmp_path: Path) -> None:
    oracle = tokenizers.Tokenizer.from_file(str(write_byte_level_json(tmp_path)))
    assert 1 in oracle.encode("<|im_start|>", add_special_tokens=False).ids


def test_ignore_merges_finds_no_control_token_either(tmp_path: Path) -> None:
    path = write_byte_level_json(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["ignore_merges"] = True
    content["pre_tokenizer"]["use_regex"] = False  # the whole text is one word
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("<|im_start|>"))


def test_added_tokens_that_are_not_special_are_text_unless_they_look_like_tags(
    tmp_path: Path,
) -> None:
    path = write_byte_level_json(tmp_path)
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"] += [
        {"id": 500, "content": "    ", **flags},
        {"id": 501, "content": "<think>", **flags},
    ]
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("    ") == [500]
    assert tokenizer.token_bytes(500) == b"    "
    assert tokenizer.control_id("<think>") == 501
    assert 501 not in tokenizer.encode("<think>")
    assert tokenizer.vocab_size == 502
    assert tokenizer.token_bytes(499) == b""


def test_a_character_without_token_is_refused_with_its_place(tmp_path: Path) -> None:
    path = write_byte_level_json(tmp_path)
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["ý"]  # how byte 0xFD is spelled; never part of UTF-8
    del content["model"]["vocab"]["Ą"]  # 0x04
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("fine: ý")
    with pytest.raises(InvalidRequestError, match=r"character 3 of the text, U\+0004"):
        tokenizer.encode("abc\x04d")


def test_bos_and_eos_come_from_the_settings_beside_the_file(tmp_path: Path) -> None:
    path = write_byte_fallback_json(tmp_path, bos_token="<s>", eos_token={"content": "</s>"})
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=False, chat_template="{{ x }}")
    tokenizer = load_tokenizer(path)
    assert tokenizer.bos_id is None
    assert tokenizer.chat_template == "{{ x }}"


def test_eos_comes_from_the_model_config_when_nothing_else_names_it(tmp_path: Path) -> None:
    path = write_byte_level_json(tmp_path)
    assert load_tokenizer(path).eos_id is None
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 0}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    tokenizer = load_tokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_sentencepiece_models_take_the_template_beside_them(tmp_path: Path) -> None:
    shutil.copy(mistral_file("v1"), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ x }}", "add_bos_token": False})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "{{ x }}"
    assert tokenizer.bos_id is None


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3"])
def test_a_directory_is_searched_for_its_tokenizer(name: str, tmp_path: Path) -> None:
    shutil.copy(mistral_file("v3"), tmp_path / name)
    assert load_tokenizer(tmp_path).vocab_size == 32768


def test_the_sentencepiece_model_comes_first(tmp_path: Path) -> None:
    shutil.copy(mistral_file("v1"), tmp_path / "tokenizer.model")
    write_byte_fallback_json(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 32000


def test_the_json_file_comes_first_where_it_has_more_tokens(tmp_path: Path) -> None:
    shutil.copy(mistral_file("v1"), tmp_path / "tokenizer.model")
    path = write_byte_level_json(tmp_path)
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 32000, "content": "<|x|>"})
    path.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).control_id("<|x|>") == 32000


def test_no_tokenizer_at_all_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"looked for .*tokenizer\.model, tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_broken_file_is_a_checkpoint_error_naming_it(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x89 nonsense")
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "Unigram"}, "not a BPE tokenizer"),
        ({"byte_fallback": False}, "neither byte-level nor with byte fallback"),
        ({"ignore_merges": True}, "ignore_merges"),
        ({"vocab": {"a": 0}}, "256 bytes have no piece, first <0x00>"),
        ({"merges": [["no", "such"]]}, "tokenizer.json"),
    ],
)
def test_json_tokenizers_that_could_lose_text_are_refused(
    model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_byte_fallback_json(tmp_path)
    edit_json(path, model=json.loads(path.read_text())["model"] | model)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(path)


def test_a_byte_level_piece_that_is_no_bytes_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = write_byte_level_json(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["vocab"]["漢"] = 999
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="token 999 is spelled with '漢'"):
        load_tokenizer(path)


def test_a_json_tokenizer_without_a_space_is_refused(tmp_path: Path) -> None:
    path = write_byte_level_json(tmp_path)
    content = json.loads(path.read_text())
    del content["model"]["vocab"]["Ġ"]
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no token for a single space"):
        load_tokenizer(path)


def test_a_json_tokenizer_may_add_no_space(tmp_path: Path) -> None:
    path = write_byte_fallback_json(tmp_path)
    content = json.loads(path.read_text())
    del content["normalizer"]["normalizers"][0]
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert not tokenizer.adds_leading_space
    assert [tokenizer.id_to_piece(i) for i in tokenizer.encode_space()] == ["▁"]


def test_byte_characters_are_gpt2_own() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_characters()) == sorted(ByteLevel.alphabet())
    ((spelled, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("é \n~")
    assert [byte_characters().index(c) for c in spelled] == [*"é \n~".encode()]


def test_a_wrong_type_in_the_settings_is_named(tmp_path: Path) -> None:
    path = write_byte_level_json(tmp_path, add_bos_token="yes")
    with pytest.raises(CheckpointError, match="add_bos_token='yes'"):
        load_tokenizer(path)


def test_settings_that_are_no_object_are_named(tmp_path: Path) -> None:
    path = write_byte_level_json(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: must hold a JSON object"):
        load_tokenizer(path)
