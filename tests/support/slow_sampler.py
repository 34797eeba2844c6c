"""The sampler as one would say it: a sort, a cut, a walk, one token after the other."""

import math
import struct
from collections import Counter
from collections.abc import Sequence

import torch

from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampler import Sampler
from mixfleet_engine.step import PlannedChunk, SampledToken
from mixfleet_engine.uniform import uniform


def fp32(value: float) -> float:
    """Return ``value`` rounded to fp32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def slow_adjusted(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    """Logits after bias and penalties."""
    adjusted = list(logits)
    for token_id, bias in params.logit_bias:
        adjusted[token_id] = fp32(adjusted[token_id] + bias)
    for token_id in {*prompt, *answer}:
        value = adjusted[token_id]
        penalty = params.repetition_penalty
        adjusted[token_id] = value / penalty if value > 0 else value * penalty
    for token_id, times in Counter(answer).items():
        adjusted[token_id] -= params.presence_penalty + params.frequency_penalty * times
    return [fp32(value) for value in adjusted]


def slow_order(logits: Sequence[float]) -> list[int]:
    """Token ids from the most likely one downwards, ties to the lower id."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def slow_token(logits: Sequence[float], params: SamplingParams, position: int) -> int:
    """The token for adjusted logits."""
    order = slow_order(logits)
    if params.temperature == 0:
        return order[0]
    weight = {t: math.exp((logits[t] - logits[order[0]]) / params.temperature) for t in order}
    kept = order[: params.top_k] if params.top_k else order
    total = sum(weight[t] for t in kept)
    mass, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += weight[token] / total
        if mass >= params.top_p:
            break
    nucleus = [t for t in nucleus if weight[t] >= params.min_p]
    draw = uniform(params.seed, position) * sum(weight[t] for t in nucleus)
    for token in sorted(nucleus):
        draw -= weight[token]
        if draw < 0:
            return token
    raise AssertionError("the draw is below the total")


def sampling_chunk(
    params: SamplingParams, position: int, history: TokenHistory | None = None
) -> PlannedChunk:
    """Return a chunk of which only the sampler's part says anything."""
    return PlannedChunk(
        request_id="any",
        token_ids=(0,),
        start=0,
        block_table=(0,),
        samples=True,
        sampling=params,
        history=history or TokenHistory((0,), (0,) * position),
        position=position,
    )


def fresh_sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """Return the token ids of a sampler that has seen nothing before."""
    return [token.token_id for token in fresh_tokens(logits, params, positions)]


def fresh_tokens(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[SampledToken]:
    """Return the tokens of a sampler that has seen nothing before, for answers of zeros."""
    history = TokenHistory((0,), (0,) * max(positions, default=0))
    pairs = zip(params, positions, strict=True)
    return Sampler().sample(logits, [sampling_chunk(p, position, history) for p, position in pairs])
