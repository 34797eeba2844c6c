"""What one step of the engine computes, as plain integers.

What the model needs of a plan is plain integers, so that it can be sent to every tensor-parallel
rank; what only the sampler needs stays on rank 0. It knows nothing of tensors: ``batch.py`` turns
it into them.
"""

from dataclasses import dataclass
from typing import Final

from mixfleet_engine.grammar import GrammarState
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams, TokenLogprobs

NO_TOKEN: Final = -1
"""What a runner samples for a chunk whose logits are not finite."""
UNREAD: Final = -2
"""Stands in a chunk for a token that the launch before samples, and only the device knows."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What a runner returns for a chunk that samples."""

    token_id: int
    """``NO_TOKEN`` where the logits are not finite."""
    logprobs: TokenLogprobs | None = None
    """Set if the chunk's settings ask for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedChunk:
    """A run of neighbouring tokens of one sequence that goes through the model in this step.

    A decode is a chunk of one token; a prefill is one chunk or, when the prompt is long, several
    in consecutive steps. Example, a prompt of 5 tokens in blocks of 4, at most 3 tokens a step::

        step 1   start=0  token_ids=(p0, p1, p2)  block_table=(7,)     samples=False
        step 2   start=3  token_ids=(p3, p4)      block_table=(7, 2)   samples=True   position=0
        step 3   start=5  token_ids=(a0,)         block_table=(7, 2)   samples=True   position=1
    """

    request_id: str
    token_ids: tuple[int, ...]
    """Tokens to run through the model in this step, at least one. ``(UNREAD,)`` where the one token
    is still being sampled."""
    start: int
    """Position of the first of them in the sequence: so many tokens are in the KV cache already."""
    block_table: tuple[int, ...]
    """The blocks of positions ``0 .. start + len(token_ids) - 1``, in order, and no others."""
    samples: bool
    """Whether a token is sampled after the last one; False inside a chunked prefill."""
    sampling: SamplingParams
    history: TokenHistory
    """The request's tokens up to the one to be sampled, but for an unread one: what the penalties
    count. It grows when the launch before is booked."""
    position: int
    """Number of answer tokens before the sampled one, 0 for the first. It goes with the seed, and
    means nothing where the chunk does not sample."""
    grammar: GrammarState | None = None
    """Which tokens may be sampled; None: any."""
    unread_row: int | None = None
    """Which of the tokens that the launch before samples, counted from 0, is this chunk's unread
    one. If it turns out to be ``NO_TOKEN``, any token will do: nobody reads what comes of it. None:
    ``token_ids`` are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Everything that one forward pass computes."""

    chunks: tuple[PlannedChunk, ...]
    """One chunk per sequence that takes part; decodes first. Empty when nothing is ready."""
    clear_blocks: tuple[int, ...] = ()
    """Blocks to fill with zeros before anything else: an earlier owner may have left a NaN there.
    Several chunks may read the same block; none of these is read before this step writes it."""

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def num_samples(self) -> int:
        """Tokens that the runner returns: one per chunk that samples."""
        return sum(chunk.samples for chunk in self.chunks)
