"""What changes logits before a token is chosen from them: biases and penalties.

Only the tokens concerned are touched, so the cost goes with their number and not with the
vocabulary. Which tokens a request holds, and how often, is remembered from step to step: a step
adds its new tokens and does not go through the context again.

Shape letters: R rows, V vocabulary, E entries, each a token of a row.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.step import PlannedChunk


class TokenCounts:
    """How often a request's answer holds each token that its prompt or answer holds.

    Args:
        history: The request's tokens.
        first: Tokens before this one do not matter, 0 or the length of the prompt.
    """

    def __init__(self, history: TokenHistory, first: int) -> None:
        self.first = first
        self.num_counted = max(first, history.num_prompt)
        """The first so many tokens of the history are counted."""
        prompt = dict.fromkeys(history.token_ids[first : history.num_prompt])
        self._places = {token_id: place for place, token_id in enumerate(prompt)}
        # Longer than what they hold, so that most new tokens cost no copy.
        self._token_ids = numpy.array(list(prompt), numpy.int64)
        self._counts = numpy.zeros(len(prompt))

    def catch_up(self, history: TokenHistory, end: int) -> None:
        """Count the answer's tokens up to the history's token number ``end``, not included."""
        new = history.token_ids[self.num_counted : end]
        for token_id in new:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._token_ids):
                self._grow()
            self._token_ids[place] = token_id
            self._counts[place] += 1
        self.num_counted += len(new)

    @property
    def token_ids(self) -> NDArray[numpy.int64]:
        """``[E]`` in order of their first coming."""
        return self._token_ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[numpy.float64]:
        """``[E]`` times in the answer."""
        return self._counts[: len(self._places)]

    def _grow(self) -> None:
        more = max(64, len(self._token_ids))
        self._token_ids = numpy.concatenate([self._token_ids, numpy.zeros(more, numpy.int64)])
        self._counts = numpy.concatenate([self._counts, numpy.zeros(more)])


class Penalties:
    """Biases and penalties of requests, with what it remembers of those that are still alive."""

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[TokenHistory, TokenCounts] = WeakKeyDictionary()

    def adjusted(self, logits: Tensor, chunks: Sequence[PlannedChunk]) -> Tensor:
        """Return ``logits`` with each chunk's bias, then its penalties; the same if there are none.

        The order is bias, repetition penalty (tokens of prompt and answer), presence and frequency
        penalty (tokens of the answer), as in CTRL (arXiv 1909.05858) and the OpenAI API. Numbers
        that are not finite stay as they are, and no other becomes so.

        Args:
            logits: ``[R, V]`` fp32; left alone.
            chunks: R chunks that sample. What counts are the tokens before the sampled one.
        """
        biased = [(row, c) for row, c in enumerate(chunks) if c.sampling.logit_bias]
        penalised = [(row, c) for row, c in enumerate(chunks) if c.sampling.counts_tokens]
        if not biased and not penalised:
            return logits
        changed = logits.clone(memory_format=torch.contiguous_format)
        if biased:
            _add_biases(changed, [(row, c.sampling) for row, c in biased])
        if penalised:
            counts = [self._caught_up(chunk) for _, chunk in penalised]
            _penalise(changed, [(row, c.sampling) for row, c in penalised], counts)
        return changed

    def _caught_up(self, chunk: PlannedChunk) -> TokenCounts:
        history = chunk.history
        first = 0 if chunk.sampling.repetition_penalty != 1 else history.num_prompt
        end = history.num_prompt + chunk.position
        counts = self._counts.get(history)
        # A step that failed comes again with the same end and adds nothing.
        if counts is None or counts.num_counted > end or counts.first != first:
            counts = self._counts[history] = TokenCounts(history, first)
        counts.catch_up(history, end)
        return counts


def _add_biases(logits: Tensor, rows: Sequence[tuple[int, SamplingParams]]) -> None:
    """Add the biases of ``rows``, pairs of a row's number and its settings, in place."""
    vocab_size = logits.shape[-1]
    places = [row * vocab_size + token_id for row, p in rows for token_id, _ in p.logit_bias]
    biases = [bias for _, p in rows for _, bias in p.logit_bias]
    where = torch.tensor(places, device=logits.device)
    old = logits.view(-1)[where]
    new = old + torch.tensor(biases, dtype=torch.float64, device=logits.device)
    _put(logits, where, old, new)


def _penalise(
    logits: Tensor, rows: Sequence[tuple[int, SamplingParams]], counts: Sequence[TokenCounts]
) -> None:
    """Apply the penalties of ``rows`` in place; ``counts`` has an entry per row."""
    lengths = [len(c.token_ids) for c in counts]
    if not any(lengths):
        return
    vocab_size = logits.shape[-1]
    places = numpy.concatenate(
        [row * vocab_size + c.token_ids for (row, _), c in zip(rows, counts, strict=True)]
    )
    settings = numpy.array(
        [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for _, p in rows]
    )
    # [4, E]: repetition, presence, frequency, times in the answer.
    columns = numpy.vstack(
        [settings.T.repeat(lengths, axis=1), numpy.concatenate([c.counts for c in counts])]
    )
    where = torch.from_numpy(places).to(logits.device)
    repetition, presence, frequency, times = torch.from_numpy(columns).to(logits.device)
    old = logits.view(-1)[where]
    new = old.double()
    new = torch.where(new > 0, new / repetition, new * repetition)
    new -= presence * (times > 0) + frequency * times
    _put(logits, where, old, new)


def _put(logits: Tensor, where: Tensor, old: Tensor, new: Tensor) -> None:
    """Write fp64 ``new`` over ``old`` at ``where``, but leave what was not finite."""
    highest = torch.finfo(logits.dtype).max
    bounded = new.clamp(-highest, highest).to(logits.dtype)
    logits.view(-1)[where] = torch.where(old.isfinite(), bounded, old)
