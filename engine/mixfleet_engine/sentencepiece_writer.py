"""Writes a sentencepiece BPE model file: a few protobuf fields, so that protobuf is not needed."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

_VARINT, _BYTES, _FLOAT = 0, 2, 5  # protobuf's wire types

# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_SPELLING, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 40, 41, 42, 43
_UNK_PIECE, _BOS_PIECE, _EOS_PIECE = 45, 46, 47
_NORMALIZER_NAME, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 1, 3, 4, 5
_BPE = 2
_UNKNOWN_KIND = 2
_NO_ID = (1 << 64) - 1
"""-1, as protobuf writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token of the model."""

    spelling: str
    score: float
    kind: int
    """1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""


def sentencepiece_model(
    pieces: Sequence[Piece],
    *,
    bos_id: int | None,
    eos_id: int | None,
    adds_leading_space: bool,
) -> bytes:
    """Return the content of a ``tokenizer.model`` with these pieces, text taken as it is."""
    unk_id = next((i for i, piece in enumerate(pieces) if piece.kind == _UNKNOWN_KIND), None)
    trainer = _number(_MODEL_TYPE, _BPE)
    trainer += _number(_VOCAB_SIZE, len(pieces)) + _number(_BYTE_FALLBACK, 1)
    for number, name_number, token_id in (
        (_UNK_ID, _UNK_PIECE, unk_id),
        (_BOS_ID, _BOS_PIECE, bos_id),
        (_EOS_ID, _EOS_PIECE, eos_id),
    ):
        trainer += _number(number, _NO_ID if token_id is None else token_id)
        if token_id is not None:
            trainer += _block(name_number, pieces[token_id].spelling.encode())
    trainer += _number(_PAD_ID, _NO_ID)
    normalizer = (
        _block(_NORMALIZER_NAME, b"identity")
        + _number(_ADD_DUMMY_PREFIX, int(adds_leading_space))
        + _number(_REMOVE_EXTRA_SPACES, 0)
        + _number(_ESCAPE_SPACES, 1)
    )
    body = b"".join(_block(_PIECES, _piece(piece)) for piece in pieces)
    return body + _block(_TRAINER, trainer) + _block(_NORMALIZER, normalizer)


def _piece(piece: Piece) -> bytes:
    score = _tag(_PIECE_SCORE, _FLOAT) + struct.pack("<f", piece.score)
    return (
        _block(_PIECE_SPELLING, piece.spelling.encode()) + score + _number(_PIECE_KIND, piece.kind)
    )


def _block(number: int, content: bytes) -> bytes:
    return _tag(number, _BYTES) + varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _tag(number, _VARINT) + varint(value)


def _tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def varint(value: int) -> bytes:
    """Return ``value`` as protobuf writes it.

    Seven bits at a time, the lowest first, and every byte but the last is marked by its high bit.
    """
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
