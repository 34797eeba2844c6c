"""Sampling without a word to the host: the sampler's tokens, from settings that lie on the device.

What it draws is what ``sampler.py`` draws for the same rows, by other ways: nothing here branches
on a setting, so that one CUDA graph serves all rows, and no row is ever unsure. It knows neither
grammars nor penalties nor logprobs; `draws_on_device` tells who needs these.

Shape letters: R rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Final

from torch import Tensor

from mixfleet_engine.filters import kept_weights, lowest_kept
from mixfleet_engine.ranking import argmax, block_maxima
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampling_rows import COLDEST
from mixfleet_engine.step import NO_TOKEN, PlannedChunk
from mixfleet_engine.token_draw import draw
from mixfleet_engine.uniform import uniform

NUM_SETTINGS: Final = 6
"""Numbers of a row's settings."""


def draws_on_device(chunk: PlannedChunk) -> bool:
    """Whether the chunk's token can be sampled here."""
    params = chunk.sampling
    return (
        chunk.grammar is None
        and not params.logit_bias
        and params.logprobs is None
        and params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
    )


def row_settings(params: SamplingParams, position: int, vocab_size: int) -> tuple[float, ...]:
    """Return a row's settings as numbers that fp64 holds exactly."""
    if params.temperature == 0:
        return (1.0, 1.0, 0.0, float(vocab_size), 1.0, -math.inf)
    return (
        0.0,
        max(params.temperature, COLDEST),
        uniform(params.seed, position),
        float(min(params.top_k or vocab_size, vocab_size)),
        params.top_p,
        lowest_kept(params.min_p),
    )


def is_greedy(chunks: Sequence[PlannedChunk]) -> bool:
    """Whether all of them take the most likely token."""
    return all(chunk.sampling.temperature == 0 for chunk in chunks)


def draw_greedy(logits: Tensor) -> Tensor:
    """Return ``[R]`` most likely tokens of ``[R, V]`` fp32, ``NO_TOKEN`` for no finite best."""
    maxima = block_maxima(logits)
    return _checked(argmax(logits, maxima), maxima.amax(-1, keepdim=True))


def draw_tokens(logits: Tensor, settings: Tensor) -> Tensor:
    """Return ``[R]`` token ids, ``NO_TOKEN`` where the best logit is not a finite number.

    Args:
        logits: ``[R, V]`` fp32.
        settings: ``[NUM_SETTINGS, R]`` fp64, a column of `row_settings` for each row.
    """
    greedy, temperatures, uniforms, top_k, top_p, lowest = settings[:, :, None]
    maxima = block_maxima(logits)
    best = maxima.amax(-1, keepdim=True)
    weights = kept_weights(
        logits, best, temperatures.float(), top_k=top_k, top_p=top_p, lowest=lowest
    )
    drawn = draw(weights, uniforms)
    return _checked(argmax(logits, maxima).where(greedy[:, 0] == 1, drawn), best)


def _checked(token_ids: Tensor, best: Tensor) -> Tensor:
    # Neither infinity nor a NaN is below infinity.
    return token_ids.masked_fill(~(best[:, 0].abs() < math.inf), NO_TOKEN)
