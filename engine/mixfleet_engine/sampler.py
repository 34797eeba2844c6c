"""From logits to token ids, for all rows of a step at once.

A row's token depends on its own logits, settings, seed and tokens only. So it is the same in any
batch, and a request that moves to another worker goes on as if it had stayed.

The order, as in vLLM and Hugging Face where these agree: the grammar's mask, bias, repetition
penalty, presence and frequency penalty, temperature, top-k, top-p over the probabilities of what
top-k left (made to sum up to 1 again), min-p as a share of the most likely token's probability.
Ties go to the lower id everywhere.

Shape letters: R rows, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixfleet_engine.filters import UNSURE, draw_filtered, draw_wide, is_filtered
from mixfleet_engine.logprobs import token_logprobs
from mixfleet_engine.masks import masked
from mixfleet_engine.penalties import Penalties
from mixfleet_engine.ranking import argmax
from mixfleet_engine.request import SamplingParams, TokenLogprobs
from mixfleet_engine.sampling_rows import SamplingRows
from mixfleet_engine.step import NO_TOKEN, PlannedChunk, SampledToken
from mixfleet_engine.token_draw import draw, token_weights


class Sampler:
    """Chooses tokens; all it keeps from step to step is what the penalties count."""

    def __init__(self) -> None:
        self._penalties = Penalties()

    def sample(self, logits: Tensor, chunks: Sequence[PlannedChunk]) -> list[SampledToken]:
        """Return a token per row, ``NO_TOKEN`` where the best logit is not a finite number.

        Args:
            logits: ``[R, V]`` fp32, the model's; left as they are.
            chunks: R chunks that sample.
        """
        params = [chunk.sampling for chunk in chunks]
        adjusted = self._penalties.adjusted(masked(logits, chunks), chunks)
        rows = SamplingRows.of(adjusted, params, [chunk.position for chunk in chunks])
        token_ids = _widened(rows, _choose(rows).tolist())
        logprobs = _logprobs(logits, params, token_ids)
        return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def _choose(rows: SamplingRows) -> Tensor:
    """Return ``[R]`` token ids, with ``NO_TOKEN`` and ``UNSURE`` among them."""
    ways = [_way(p) for p in rows.params]
    chosen = torch.empty(len(ways), dtype=torch.int64, device=rows.logits.device)
    for way in dict.fromkeys(ways):
        numbers = [row for row, other in enumerate(ways) if other is way]
        if len(numbers) == len(ways):
            chosen = way(rows)
        else:
            index = torch.tensor(numbers, device=chosen.device)
            chosen.index_copy_(0, index, way(rows.select(numbers)))
    # Neither infinity nor a NaN is below infinity.
    return chosen.masked_fill_(~(rows.best[:, 0].abs() < math.inf), NO_TOKEN)


def _way(params: SamplingParams) -> Callable[[SamplingRows], Tensor]:
    if params.temperature == 0:
        return _draw_best
    return draw_filtered if is_filtered(params) else _draw_plain


def _draw_best(rows: SamplingRows) -> Tensor:
    return argmax(rows.logits, rows.maxima)


def _draw_plain(rows: SamplingRows) -> Tensor:
    weights = token_weights(rows.logits, rows.best, rows.temperatures())
    return draw(weights, rows.uniforms())


def _widened(rows: SamplingRows, token_ids: list[int]) -> list[int]:
    """Return ``token_ids`` with more effort spent on the rows that are ``UNSURE``."""
    unsure = [row for row, token_id in enumerate(token_ids) if token_id == UNSURE]
    if unsure:
        found = draw_wide(rows.select(unsure)).tolist()
        for row, token_id in zip(unsure, found, strict=True):
            token_ids[row] = token_id
    return token_ids


def _logprobs(
    logits: Tensor, params: Sequence[SamplingParams], token_ids: Sequence[int]
) -> dict[int, TokenLogprobs]:
    """Return what was asked for, by row; rows without a token have none."""
    wanted = [
        (row, token_id, p.logprobs)
        for row, (token_id, p) in enumerate(zip(token_ids, params, strict=True))
        if p.logprobs is not None and token_id != NO_TOKEN
    ]
    if not wanted:
        return {}
    numbers, chosen, num_top = zip(*wanted, strict=True)
    if len(numbers) < len(params):
        logits = logits.index_select(0, torch.tensor(numbers, device=logits.device))
    return dict(zip(numbers, token_logprobs(logits, chosen, num_top), strict=True))
