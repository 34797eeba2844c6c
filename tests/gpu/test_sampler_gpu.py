"""The sampler on a CUDA device: a row's tokens are the same alone and among others."""

import random

import pytest
import torch

from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampler import Sampler
from support.slow_sampler import sampling_chunk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([0, 0, 50, 700]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.6]),
        logit_bias=rng.choice([(), ((3, 2.5), (60, -1.0))]),
        seed=rng.getrandbits(64),
    )


@pytest.mark.parametrize("vocab", [32000, 50257])
def test_a_row_alone_gives_what_it_gives_in_a_batch_and_on_a_cpu(vocab: int) -> None:
    rng, num_rows = random.Random(vocab), 32
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(0)) * 4
    histories = [TokenHistory(tuple(range(50)), tuple(range(20, 80))) for _ in range(num_rows)]
    chunks = [sampling_chunk(random_params(rng), 60, history) for history in histories]
    together = Sampler().sample(logits.cuda(), chunks)
    alone = [
        Sampler().sample(logits[row : row + 1].cuda(), [chunks[row]])[0] for row in range(num_rows)
    ]
    assert alone == together
    assert Sampler().sample(logits, chunks) == together
