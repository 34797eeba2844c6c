"""What comes in at the engine's door and what goes out: token ids, never text."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "error", "deadline", "grammar"]
"""``error``: the model's numbers for this request were not finite, so no token can be chosen.
``deadline``: its time was over before the answer was complete. ``grammar``: its grammar has become
too complex in the middle of the answer, or has led where no token can go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from the logits."""

    temperature: float = 0.0
    """0 is greedy, exactly: the argmax, ties to the lowest id."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the most likely one's probability; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens seen in prompt or answer and multiplies the negative
    ones (CTRL, arXiv 1909.05858); 1 does nothing."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer holds already."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time that the answer holds it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of token id and what is added to its logit before everything else."""
    logprobs: int | None = None
    """Report the log-probability of the sampled token and of so many most likely ones, by the
    model's own logits; None reports nothing."""
    seed: int = 0
    """64 bits. With the token's position it fixes the random number, so that the same request
    gives the same tokens in any batch and on any worker."""

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice hangs on the tokens before also apart from the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


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
    priority: int = 0
    """Lower goes first; among equals the first come."""
    deadline: float | None = None
    """Seconds on the engine's clock at which the answer is of no use any more; None: never."""
    grammar: str | None = None
    """What the answer must be, in llguidance's dialect of Lark, see grammar.py. Stop tokens are
    allowed exactly where it may end, and it ends where nothing may follow. None: anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """How likely the model found a sampled token, in natural logarithms."""

    logprob: float
    """Of the sampled token."""
    top: tuple[tuple[int, float], ...]
    """Token ids and log-probabilities of the most likely ones, best first, ties to the lower id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step added to one answer."""

    request_id: str
    token_ids: tuple[int, ...]
    """New tokens, at least one, in order; none with the finish reasons ``error``, ``deadline`` and
    ``grammar``, and with ``stop`` where an earlier run had found the last one."""
    finish_reason: FinishReason | None = None
    """Set on the last output of a request; the engine has forgotten the request by then."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token if the request asked for them, else none."""
