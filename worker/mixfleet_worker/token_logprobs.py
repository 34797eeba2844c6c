"""The engine's log-probabilities as readers get them: a token's bytes in the place of its id."""

from collections.abc import Sequence

from mixfleet_broker.event_codec import MAX_LOGPROB
from mixfleet_broker.messages import TokenLogprob
from mixfleet_engine.request import TokenLogprobs
from mixfleet_engine.tokenizer import Tokenizer


def wire_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], found: Sequence[TokenLogprobs]
) -> tuple[TokenLogprob, ...]:
    """Return what is told of each token of a chunk, in order.

    Args:
        tokenizer: The model's.
        token_ids: The chunk's tokens.
        found: What the engine says of each of them; empty when the job did not ask.
    """
    if not found:
        return ()
    return tuple(
        TokenLogprob(
            token=_named(tokenizer, token_id),
            logprob=_bounded(one.logprob),
            top=tuple((_named(tokenizer, other), _bounded(value)) for other, value in one.top),
            is_control=_is_control(tokenizer, token_id),
        )
        for token_id, one in zip(token_ids, found, strict=True)
    )


def _named(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Return a token's bytes.

    A control token adds nothing to the text and goes by its name, ``</s>``: among the most likely
    tokens an empty one would tell nobody that the model was about to end.
    """
    if _is_control(tokenizer, token_id):
        return tokenizer.id_to_piece(token_id).encode()
    return tokenizer.token_bytes(token_id)


def _is_control(tokenizer: Tokenizer, token_id: int) -> bool:
    return token_id in tokenizer.control_ids and not tokenizer.token_bytes(token_id)


def _bounded(logprob: float) -> float:
    """Return the value that the wire carries; minus infinity is its lowest, ``-MAX_LOGPROB``."""
    return -MAX_LOGPROB if not logprob > -MAX_LOGPROB else min(logprob, 0.0)
