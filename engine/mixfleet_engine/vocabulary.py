"""The table behind a tokenizer: each token's spelling, its bytes, and which are control tokens."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mixfleet_engine.errors import CheckpointError

SPACE = "\u2581"
"""How sentencepiece spells a space."""
NUM_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """All tokens of a model, by id."""

    pieces: tuple[str, ...]
    piece_bytes: tuple[bytes, ...]
    """What each token adds to an answer; empty for control tokens."""
    control_id_by_name: Mapping[str, int]

    def id_to_piece(self, token_id: int) -> str:
        """Return the spelling, "" for a padding row of the model."""
        assert token_id >= 0, token_id
        return self.pieces[token_id] if token_id < len(self.pieces) else ""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes, none for a padding row of the model."""
        assert token_id >= 0, token_id
        return self.piece_bytes[token_id] if token_id < len(self.piece_bytes) else b""

    def space_id(self, source: Path) -> int:
        """Return the token of one space; a byte piece only where there is no other.

        Raises:
            CheckpointError: There is none; the text names the file ``source``.
        """
        found = [token_id for token_id, part in enumerate(self.piece_bytes) if part == b" "]
        if not found:
            raise CheckpointError(f"{source}: no token for a single space")
        as_byte = byte_piece(ord(" "))
        return min(found, key=lambda token_id: self.pieces[token_id] == as_byte)


def sentencepiece_vocabulary(pieces: tuple[str, ...], control: Collection[int]) -> Vocabulary:
    """Return the vocabulary of a model that spells spaces ``▁`` and single bytes ``<0x0A>``."""
    byte_of = {byte_piece(value): bytes([value]) for value in range(NUM_BYTES)}
    return _vocabulary(
        pieces,
        tuple(byte_of.get(piece) or piece.replace(SPACE, " ").encode() for piece in pieces),
        control,
    )


def byte_level_vocabulary(
    pieces: tuple[str, ...], control: Collection[int], plain: Collection[int], source: Path
) -> Vocabulary:
    """Return the vocabulary of a model that spells each byte as one printable character.

    Args:
        pieces: Spelling of every token.
        control: Ids of the control tokens.
        plain: Ids of tokens that are spelled as the text they stand for.
        source: The file they come from, for the error.

    Raises:
        CheckpointError: A piece is spelled with a character that stands for no byte.
    """
    byte_of = {character: value for value, character in enumerate(byte_characters())}

    def to_bytes(token_id: int, piece: str) -> bytes:
        if token_id in control or token_id in plain:
            return piece.encode()
        try:
            return bytes(byte_of[character] for character in piece)
        except KeyError as error:
            raise CheckpointError(
                f"{source}: token {token_id} is spelled with {error.args[0]!r}, not a byte"
            ) from None

    return _vocabulary(
        pieces, tuple(to_bytes(token_id, piece) for token_id, piece in enumerate(pieces)), control
    )


def byte_piece(value: int) -> str:
    """Return how sentencepiece spells a single byte: ``<0x0A>``."""
    return f"<0x{value:02X}>"


def byte_characters() -> tuple[str, ...]:
    """Return the character by which byte-level BPE (GPT-2's) spells each of the 256 bytes.

    Printable bytes of Latin-1 stand for themselves; the other 68, in order, are U+0100 and up,
    which makes a space ``Ġ``.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (value for value in range(NUM_BYTES) if value not in printable)
    stand_in = {value: chr(NUM_BYTES + index) for index, value in enumerate(others)}
    return tuple(stand_in.get(value, chr(value)) for value in range(NUM_BYTES))


def _vocabulary(
    pieces: tuple[str, ...], piece_bytes: tuple[bytes, ...], control: Collection[int]
) -> Vocabulary:
    return Vocabulary(
        pieces=pieces,
        piece_bytes=tuple(
            b"" if token_id in control else part for token_id, part in enumerate(piece_bytes)
        ),
        control_id_by_name={pieces[token_id]: token_id for token_id in sorted(control)},
    )
