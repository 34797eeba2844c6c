"""The tokenizer of a Hugging Face ``tokenizer.json`` (BPE, byte-level or with byte pieces)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from mixfleet_engine.errors import CheckpointError, InvalidRequestError
from mixfleet_engine.tokenizer import check_text, looks_like_markup
from mixfleet_engine.tokenizer_settings import TokenizerSettings, read_json_object
from mixfleet_engine.vocabulary import (
    NUM_BYTES,
    Vocabulary,
    byte_characters,
    byte_level_vocabulary,
    byte_piece,
    sentencepiece_vocabulary,
)

_PROBE = "|"


class JsonTokenizer:
    """Implements :class:`~mixfleet_engine.tokenizer.Tokenizer` with the ``tokenizers`` library.

    The library looks for control tokens in all text it is given, also with
    ``add_special_tokens=False``. So it is given a copy of the file that has no control tokens:
    neither among its added tokens nor in its vocabulary. What is not there cannot be found.

    Raises:
        CheckpointError: The file cannot be read, is not BPE, or cannot spell all bytes, so that
            some text would be lost.
    """

    def __init__(self, path: Path) -> None:
        self._settings = TokenizerSettings.beside(path)
        source = read_json_object(path)
        _check_bpe(path, source)
        control = _control_tokens(source)
        self._vocabulary: Vocabulary = _vocabulary(path, source, control)
        self._control_ids = frozenset(control.values())
        self._text_tokenizer = _text_only(path, source, control)
        self._missing_bytes = _bytes_without_token(source)
        self._bos_id = self._find(self._settings.bos_token, self._settings.bos_token_id)
        self._eos_id = self._find(self._settings.eos_token, self._settings.eos_token_id)
        self._adds_leading_space = self.token_bytes(self.encode(_PROBE)[0]).startswith(b" ")
        self._space_id = self._vocabulary.space_id(path)

    def _find(self, name: str | None, token_id: int | None) -> int | None:
        found = self.control_id(name) if name is not None else None
        return token_id if found is None else found

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return len(self._vocabulary.pieces)

    @property
    def bos_id(self) -> int | None:
        """What ``tokenizer_config.json`` names, or None where it says not to add it."""
        return self._bos_id if self._settings.add_bos else None

    @property
    def eos_id(self) -> int | None:
        """What ``tokenizer_config.json``, or else the model's config, names."""
        return self._eos_id

    @property
    def control_ids(self) -> frozenset[int]:
        """All tokens that no text can become."""
        return self._control_ids

    @property
    def adds_leading_space(self) -> bool:
        """Whether the file puts a space before each text, as sentencepiece's descendants do."""
        return self._adds_leading_space

    @property
    def chat_template(self) -> str | None:
        """The template in ``tokenizer_config.json``, if there is one."""
        return self._settings.chat_template

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``, never a control token; see the protocol."""
        check_text(text)
        if self._missing_bytes:
            self._check_bytes(text)
        ids: list[int] = self._text_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _check_bytes(self, text: str) -> None:
        written = text.encode()
        if len(written.translate(None, self._missing_bytes)) == len(written):
            return
        index = next(
            i for i, c in enumerate(text) if not set(self._missing_bytes).isdisjoint(c.encode())
        )
        raise InvalidRequestError(
            f"character {index} of the text, U+{ord(text[index]):04X}, has no token in this model"
        )

    def encode_space(self) -> list[int]:
        """Return the one token of one space."""
        return [self._space_id]

    def control_id(self, name: str) -> int | None:
        """Return the id of the control token spelled ``name``, or None."""
        return self._vocabulary.control_id_by_name.get(name)

    def id_to_piece(self, token_id: int) -> str:
        """Return how the vocabulary spells the token."""
        return self._vocabulary.id_to_piece(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what the token adds to an answer."""
        return self._vocabulary.token_bytes(token_id)


def _check_bpe(path: Path, source: Mapping[str, Any]) -> None:
    """Raise unless the file's model is one that can encode any text as text."""
    model = source.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "vocab" not in model:
        raise CheckpointError(f"{path}: not a BPE tokenizer")
    if _is_byte_level(source):
        return
    if not model.get("byte_fallback"):
        raise CheckpointError(f"{path}: neither byte-level nor with byte fallback")
    if model.get("ignore_merges"):
        raise CheckpointError(f"{path}: ignore_merges would turn the text '<0x0A>' into a byte")
    missing = [name for name in map(byte_piece, range(NUM_BYTES)) if name not in model["vocab"]]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} bytes have no piece, first {missing[0]}")


def _is_byte_level(source: Mapping[str, Any]) -> bool:
    decoder = source.get("decoder") or {}
    return any(step.get("type") == "ByteLevel" for step in (decoder, *decoder.get("decoders", ())))


def _bytes_without_token(source: Mapping[str, Any]) -> bytes:
    """Return the bytes that the library would silently leave out of a prompt.

    Byte-level vocabularies are cut to size: SmolLM2's lacks 21 bytes. Most never occur in UTF-8.
    """
    if not _is_byte_level(source):
        return b""
    vocab = source["model"]["vocab"]
    return bytes(
        value for value, character in enumerate(byte_characters()) if character not in vocab
    )


def _vocabulary(
    path: Path,
    source: Mapping[str, Any],
    control: Mapping[str, int],
) -> Vocabulary:
    added = {token["content"]: token["id"] for token in source.get("added_tokens") or ()}
    id_by_piece: dict[str, int] = {**source["model"]["vocab"], **added}
    pieces = [""] * (max(id_by_piece.values()) + 1)
    for piece, token_id in id_by_piece.items():
        pieces[token_id] = piece
    control_ids = frozenset(control.values())
    if _is_byte_level(source):
        plain = frozenset(added.values())
        return byte_level_vocabulary(tuple(pieces), control_ids, plain, path)
    return sentencepiece_vocabulary(tuple(pieces), control_ids)


def _control_tokens(source: Mapping[str, Any]) -> dict[str, int]:
    """Return spelling and id of the tokens that no text may become."""
    control: dict[str, int] = {
        token["content"]: token["id"]
        for token in source.get("added_tokens") or ()
        if token.get("special") or looks_like_markup(token["content"])
    }
    unknown, vocab = source["model"].get("unk_token"), source["model"]["vocab"]
    if unknown in vocab:
        control[unknown] = vocab[unknown]
    return control


def _text_only(
    path: Path, source: Mapping[str, Any], control: Mapping[str, int]
) -> tokenizers.Tokenizer:
    """Return the library's tokenizer for the file without its control tokens."""
    added = [token for token in source.get("added_tokens") or () if token["content"] not in control]
    vocab = {
        **source["model"]["vocab"],
        # The library numbers added tokens itself unless it finds them in the vocabulary.
        **{token["content"]: token["id"] for token in added},
    }
    model = {
        **source["model"],
        "vocab": {piece: token_id for piece, token_id in vocab.items() if piece not in control},
        "unk_token": None,
    }
    # The post-processor would only add control tokens.
    off = dict.fromkeys(("post_processor", "truncation", "padding"))
    text_only = {**source, **off, "added_tokens": added, "model": model}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(text_only))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: {error}") from error
