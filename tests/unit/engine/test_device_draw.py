"""What is drawn on the device is what the sampler draws."""

import math
import random

import pytest
import torch

from mixfleet_engine.device_draw import draw_greedy, draw_tokens, draws_on_device, row_settings
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampler import Sampler
from mixfleet_engine.step import NO_TOKEN
from support.slow_sampler import sampling_chunk

HISTORY = TokenHistory((1, 2), (3,))


def random_params(rng: random.Random, vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.2, 1.0, 30.0, 1e-30]),
        top_k=rng.choice([0, 0, 1, 2, 64, 513, vocab, 10**6]),
        top_p=rng.choice([1.0, 1.0, 0.9, 0.3, 1e-9]),
        min_p=rng.choice([0.0, 0.0, 1e-6, 0.05, 1.0]),
        seed=rng.getrandbits(64),
    )


@pytest.mark.parametrize("vocab", [7, 64, 512, 5003])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 8.0])
def test_the_tokens_are_the_samplers(vocab: int, spread: float) -> None:
    rng, rows = random.Random(f"{vocab} {spread}"), 40
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    logits[3, 0], logits[4], logits[5, -1] = math.nan, -math.inf, math.inf
    chunks = [sampling_chunk(random_params(rng, vocab), 1, HISTORY) for _ in range(rows)]
    expected = [token.token_id for token in Sampler().sample(logits, chunks)]
    columns = [row_settings(c.sampling, c.position, vocab) for c in chunks]
    settings = torch.tensor(columns, dtype=torch.float64).T.contiguous()
    assert draw_tokens(logits, settings).tolist() == expected
    assert expected[3:6] == [NO_TOKEN] * 3


def test_greedy_rows_alone_take_a_shorter_way_to_the_same_tokens() -> None:
    logits = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0)).round()
    logits[2, 5] = math.nan
    chunks = [sampling_chunk(SamplingParams(), 1, HISTORY)] * 9
    expected = [token.token_id for token in Sampler().sample(logits, chunks)]
    assert draw_greedy(logits).tolist() == expected


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        (SamplingParams(temperature=1, top_k=3, top_p=0.5, min_p=0.1, seed=4), True),
        (SamplingParams(logit_bias=((1, 1.0),)), False),
        (SamplingParams(logprobs=0), False),
        (SamplingParams(repetition_penalty=1.1), False),
        (SamplingParams(presence_penalty=0.1), False),
        (SamplingParams(frequency_penalty=-0.1), False),
    ],
)
def test_what_needs_the_host_is_not_drawn_on_the_device(
    params: SamplingParams, possible: bool
) -> None:
    assert draws_on_device(sampling_chunk(params, 1, HISTORY)) == possible
