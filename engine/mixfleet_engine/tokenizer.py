"""What the engine needs of a tokenizer, and which file of a checkpoint holds it.

Text and control tokens never mix: :meth:`Tokenizer.encode` turns text, whatever it contains, into
text tokens only, and a control token comes into a prompt by its id alone. So nothing that a user
types can open a turn, close one or forge a role.
"""

from pathlib import Path
from typing import Protocol

from mixfleet_engine.errors import CheckpointError, InvalidRequestError

SENTENCEPIECE_NAMES = (
    "tokenizer.model.v3",
    "tokenizer.model.v2",
    "tokenizer.model.v1",
    "tokenizer.model",
)
JSON_NAME = "tokenizer.json"


class Tokenizer(Protocol):
    """Text to token ids and back. Immutable, so any thread may use it."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; a model may have padding rows above it."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The token that begins every prompt; None where the model wants none."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The token by which the model ends its answer."""
        ...

    @property
    def control_ids(self) -> frozenset[int]:
        """All tokens that no text can become."""
        ...

    @property
    def adds_leading_space(self) -> bool:
        """Whether :meth:`encode` puts a space before the text, as sentencepiece models do.

        The first space of such a model's answer is then no part of the answer.
        """
        ...

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own Jinja template, where it has one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``, never a control token, and none at all for "".

        Raises:
            InvalidRequestError: ``text`` holds half of a surrogate pair, which is no character, or
                a character that the model has no tokens for. Says where.
        """
        ...

    def encode_space(self) -> list[int]:
        """Return the tokens of one space, without the one that :meth:`encode` may add."""
        ...

    def control_id(self, name: str) -> int | None:
        """Return the id of the control token spelled ``name``, or None if there is none."""
        ...

    def id_to_piece(self, token_id: int) -> str:
        """Return how the vocabulary spells the token: ``▁the``, ``<0x0A>``, ``</s>``."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return what the token adds to an answer: UTF-8, possibly a part of a character.

        Control tokens and the model's padding rows add nothing.
        """
        ...


def check_text(text: str) -> None:
    """Raise unless ``text`` can be written as UTF-8.

    Raises:
        InvalidRequestError: It holds half of a surrogate pair; says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"character {error.start} of the text is U+{ord(text[error.start]):04X}, "
            "half of a surrogate pair"
        ) from None


def looks_like_markup(piece: str) -> bool:
    """Whether a token that its file calls plain text is a tag, such as ``[REFERENCE_DOC_1]``.

    Tokenizers list some control tokens as "user defined" or as "not special", so that their text
    would become them. Runs of spaces are listed the same way and are text; what tells the two
    apart is the brackets.
    """
    return len(piece) > 2 and (piece[0], piece[-1]) in {("<", ">"), ("[", "]")}


def find_sentencepiece_file(path: Path) -> Path | None:
    """Return the sentencepiece model of the checkpoint in ``path``, the newest version first."""
    return next((path / name for name in SENTENCEPIECE_NAMES if (path / name).is_file()), None)


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint.

    A directory may hold ``tokenizer.model[.v1|.v2|.v3]`` and ``tokenizer.json``. The former is
    what the model was trained with and comes first, unless the latter has more tokens: fine-tunes
    add their control tokens there.

    Args:
        path: The checkpoint's directory, or one tokenizer file.

    Raises:
        CheckpointError: There is no such file, or it cannot be used.
    """
    # Imported here: the protocol above must cost neither library.
    from mixfleet_engine.tokenizer_json import JsonTokenizer
    from mixfleet_engine.tokenizer_sentencepiece import SentencePieceTokenizer

    if path.is_file():
        return JsonTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    sentencepiece_file = find_sentencepiece_file(path)
    json_file = path / JSON_NAME
    if sentencepiece_file is None:
        if not json_file.is_file():
            names = ", ".join((*SENTENCEPIECE_NAMES, JSON_NAME))
            raise CheckpointError(f"{path}: no tokenizer here; looked for {names}")
        return JsonTokenizer(json_file)
    from_model = SentencePieceTokenizer(sentencepiece_file)
    if not json_file.is_file():
        return from_model
    from_json = JsonTokenizer(json_file)
    return from_json if from_json.vocab_size > from_model.vocab_size else from_model
