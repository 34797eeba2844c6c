"""The tokenizer of a sentencepiece model: ``tokenizer.model[.v1|.v2|.v3]``."""

from pathlib import Path

import sentencepiece

from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.sentencepiece_writer import varint
from mixfleet_engine.tokenizer import check_text, looks_like_markup
from mixfleet_engine.tokenizer_settings import TokenizerSettings
from mixfleet_engine.vocabulary import NUM_BYTES, Vocabulary, sentencepiece_vocabulary

# Two fields of a piece in the model file, as protobuf writes them.
_TYPE_CONTROL = b"\x18\x03"
_TYPE_USER_DEFINED = b"\x18\x04"
_SCORE_BYTES = 4
_PROBE = "|"


class SentencePieceTokenizer:
    """Implements :class:`~mixfleet_engine.tokenizer.Tokenizer` with sentencepiece.

    sentencepiece never makes a control or a byte piece of text that merely spells one, but it does
    make "user defined" pieces of theirs. Mistral's v3 lists ``[REFERENCE_DOC_0]`` to ``_19`` as
    such; here they are control tokens like their neighbours, so that ordinary brackets typed by a
    user stay ordinary brackets.

    Raises:
        CheckpointError: The file is no sentencepiece model, or has no byte pieces, so that text
            outside its vocabulary would be lost.
    """

    def __init__(self, path: Path) -> None:
        self._processor = _load(path)
        processor = self._processor
        ids = range(processor.vocab_size())
        if sum(processor.is_byte(token_id) for token_id in ids) != NUM_BYTES:
            raise CheckpointError(f"{path}: no byte pieces, so some text could not be encoded")
        # With all bytes at hand no text needs the unknown token: it is one more that none becomes.
        self._control_ids = frozenset(
            token_id
            for token_id in ids
            if processor.is_control(token_id) or processor.is_unknown(token_id)
        )
        self._vocabulary: Vocabulary = sentencepiece_vocabulary(
            tuple(processor.id_to_piece(token_id) for token_id in ids), self._control_ids
        )
        self._settings = TokenizerSettings.beside(path)
        self._adds_leading_space = self.token_bytes(self.encode(_PROBE)[0]).startswith(b" ")
        self._space_id = self._vocabulary.space_id(path)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return len(self._vocabulary.pieces)

    @property
    def bos_id(self) -> int | None:
        """``<s>``, or None where the checkpoint says that prompts begin without it."""
        return _id_or_none(self._processor.bos_id()) if self._settings.add_bos else None

    @property
    def eos_id(self) -> int | None:
        """``</s>``."""
        return _id_or_none(self._processor.eos_id())

    @property
    def control_ids(self) -> frozenset[int]:
        """All tokens that no text can become."""
        return self._control_ids

    @property
    def adds_leading_space(self) -> bool:
        """Whether the model was trained with a space before each text."""
        return self._adds_leading_space

    @property
    def chat_template(self) -> str | None:
        """The template in ``tokenizer_config.json``, if there is one."""
        return self._settings.chat_template

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``, never a control token; see the protocol."""
        check_text(text)
        ids: list[int] = self._processor.encode(text)
        return ids

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


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a sentencepiece model: {error}") from error
    model = processor.serialized_model_proto()
    patched = _with_markup_as_control(model, processor)
    if patched == model:
        return processor
    return sentencepiece.SentencePieceProcessor(model_proto=patched)


def _with_markup_as_control(model: bytes, processor: sentencepiece.SentencePieceProcessor) -> bytes:
    """Return the model file with each user-defined tag turned into a control piece.

    A piece is written as: 0x0A, length, spelling, 0x15, score (4 bytes), 0x18, type. Only the last
    byte changes, so nothing moves.
    """
    patched = bytearray(model)
    for token_id in range(processor.vocab_size()):
        piece = processor.id_to_piece(token_id)
        if not looks_like_markup(piece):
            continue
        spelling = piece.encode()
        start = model.find(head := b"\x0a" + varint(len(spelling)) + spelling + b"\x15")
        end = start + len(head) + _SCORE_BYTES
        if start >= 0 and model[end : end + 2] == _TYPE_USER_DEFINED:
            patched[end : end + 2] = _TYPE_CONTROL
    return bytes(patched)


def _id_or_none(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
