"""What comes in at the engine's door and what goes out: token ids, never text."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "error"]
"""``error``: the model's numbers for this request were not finite, so no token can be chosen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from the logits."""

    temperature: float = 0.0
    """0 is greedy, exactly: the argmax, ties to the lowest id."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    seed: int = 0
    """64 bits. With the token's position it fixes the random number, so that the same request
    gives the same tokens in any batch and on any worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One answer to be generated."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    """At least one token."""
    output_token_ids: tuple[int, ...] = ()
    """Tokens of the answer that an earlier run already delivered; this run goes on after them."""
    max_tokens: int
    """Length of the whole answer, ``output_token_ids`` included, and more than these."""
    stop_token_ids: frozenset[int] = frozenset()
    """The answer ends with the first of these; the token itself is part of the output."""
    sampling: SamplingParams = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step added to one answer."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens, at least one, in order; none with the finish reason ``error``."""
    finish_reason: FinishReason | None = None
    """Set on the last output of a request; the engine has forgotten the request by then."""
