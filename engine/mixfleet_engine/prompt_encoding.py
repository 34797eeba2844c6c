"""What all chat formats share when they turn text into tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mixfleet_engine.conversation import Message
from mixfleet_engine.errors import ConfigError, InvalidMessagesError, InvalidRequestError
from mixfleet_engine.tokenizer import Tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the prompt that asks for the continuation of plain ``text``: BOS and its tokens.

    Raises:
        InvalidRequestError: ``text`` cannot be encoded, or there would be no token at all.
    """
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids += tokenizer.encode(text)
    if not ids:
        raise InvalidRequestError("the prompt is empty")
    return ids


def needed_id(name: str, token: str, token_id: int | None) -> int:
    """Return ``token_id``, which the chat format ``name`` cannot do without.

    Raises:
        ConfigError: The tokenizer has no such token.
    """
    if token_id is None:
        raise ConfigError(f"chat_format={name!r}: the tokenizer has no {token} token")
    return token_id


@contextmanager
def naming_the_message(tokenizer: Tokenizer, messages: Sequence[Message]) -> Iterator[None]:
    """Say of text that cannot be encoded which message it is in.

    Raises:
        InvalidMessagesError: In place of the tokenizer's InvalidRequestError.
    """
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidMessagesError(_first_problem(tokenizer, messages) or str(error)) from error


def _first_problem(tokenizer: Tokenizer, messages: Sequence[Message]) -> str | None:
    for index, message in enumerate(messages):
        try:
            tokenizer.encode(message.content)
        except InvalidRequestError as error:
            return f"message {index}: {error}"
    return None
