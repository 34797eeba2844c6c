"""Penalties against the settings' words, counted anew each time."""

import gc
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from mixfleet_engine.history import TokenHistory
from mixfleet_engine.penalties import Penalties, TokenCounts
from mixfleet_engine.request import SamplingParams
from support.slow_sampler import sampling_chunk, slow_adjusted

VOCAB = 97
ALL = SamplingParams(
    repetition_penalty=1.3,
    presence_penalty=0.7,
    frequency_penalty=-0.4,
    logit_bias=((3, 5.5), (0, -100.0)),
)


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def random_tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(count))


def random_params(rng: random.Random) -> SamplingParams:
    biased = rng.sample(range(VOCAB), rng.choice([0, 0, 1, 9]))
    return SamplingParams(
        repetition_penalty=rng.choice([1.0, 1.0, 1.2, 0.5, 7.0]),
        presence_penalty=rng.choice([0.0, 0.0, 0.3, -2.0]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.1, 2.0]),
        logit_bias=tuple((token, rng.uniform(-100, 100)) for token in biased),
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_mix_of_settings_matches_the_slow_penalties(seed: int) -> None:
    rng = random.Random(seed)
    histories = [
        TokenHistory(random_tokens(rng, 1 + rng.randrange(40)), random_tokens(rng, n))
        for n in (0, 1, 2, 5, 30, 100, 300, 0, 3)
    ]
    chunks = [sampling_chunk(random_params(rng), h.num_output, h) for h in histories]
    logits = random_logits(len(chunks), seed)
    expected = [
        slow_adjusted(row, c.sampling, h.token_ids[: h.num_prompt], h.token_ids[h.num_prompt :])
        for row, c, h in zip(logits.tolist(), chunks, histories, strict=True)
    ]
    assert Penalties().adjusted(logits, chunks).tolist() == expected


def test_counts_that_grow_with_the_answer_equal_counts_made_at_once() -> None:
    rng = random.Random(1)
    history, penalties = TokenHistory(random_tokens(rng, 20)), Penalties()
    for step in range(60):
        logits = random_logits(1, step)
        chunks = [sampling_chunk(ALL, step, history)]
        remembered = penalties.adjusted(logits, chunks)
        assert torch.equal(remembered, Penalties().adjusted(logits, chunks))
        history.token_ids.append(rng.randrange(10))


def test_a_step_that_comes_again_counts_nothing_twice() -> None:
    history, penalties = TokenHistory((1, 2), (3, 3)), Penalties()
    chunks, logits = [sampling_chunk(ALL, 2, history)], random_logits(1)
    first = penalties.adjusted(logits, chunks)
    assert torch.equal(penalties.adjusted(logits, chunks), first)


def test_tokens_after_the_sampled_position_do_not_count() -> None:
    """Also where a later step has counted them already."""
    history, penalties, logits = TokenHistory((1, 2), (3, 4, 5, 3)), Penalties(), random_logits(1)
    for position in (4, 1, 3):
        before = TokenHistory((1, 2), (3, 4, 5, 3)[:position])
        expected = Penalties().adjusted(logits, [sampling_chunk(ALL, position, before)])
        found = penalties.adjusted(logits, [sampling_chunk(ALL, position, history)])
        assert torch.equal(found, expected)


def test_other_settings_for_the_same_history_count_anew() -> None:
    history, penalties, logits = TokenHistory((1, 2), (3,)), Penalties(), random_logits(1)
    for params in (SamplingParams(presence_penalty=1.0), ALL, SamplingParams(presence_penalty=1.0)):
        chunks = [sampling_chunk(params, 1, history)]
        expected = Penalties().adjusted(logits, chunks)
        assert torch.equal(penalties.adjusted(logits, chunks), expected)


def test_only_new_tokens_are_read() -> None:
    """So that a step's cost does not grow with the context."""
    history = TokenHistory(tuple(range(50)), tuple(range(40)))
    counts = TokenCounts(history, 0)
    counts.catch_up(history, 90)
    history.token_ids[:90] = [96] * 90  # nobody looks here any more
    history.token_ids.append(7)
    counts.catch_up(history, 91)
    found = dict(zip(counts.token_ids.tolist(), counts.counts.tolist(), strict=True))
    assert found == {**dict.fromkeys(range(50), 0.0), **dict(Counter((*range(40), 7)))}


def test_without_a_repetition_penalty_the_prompt_is_not_kept() -> None:
    history = TokenHistory(tuple(range(50)), (7, 60, 7))
    counts = TokenCounts(history, first=history.num_prompt)
    counts.catch_up(history, 53)
    assert counts.token_ids.tolist() == [7, 60]
    assert counts.counts.tolist() == [2, 1]


def test_a_request_that_has_gone_is_forgotten() -> None:
    penalties = Penalties()
    history = TokenHistory((1, 2), (3,))
    penalties.adjusted(random_logits(1), [sampling_chunk(ALL, 1, history)])
    assert len(penalties._counts) == 1
    del history
    gc.collect()
    assert len(penalties._counts) == 0


def test_rows_without_penalties_are_the_same_object_or_equal() -> None:
    logits, plain = random_logits(2), sampling_chunk(SamplingParams(temperature=1.0), 3)
    assert Penalties().adjusted(logits, [plain, plain]) is logits
    mixed = Penalties().adjusted(logits, [plain, sampling_chunk(ALL, 3)])
    assert torch.equal(mixed[0], logits[0])
    assert not torch.equal(mixed[1], logits[1])


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(1)
    before = logits.clone()
    Penalties().adjusted(logits, [sampling_chunk(ALL, 3)])
    assert torch.equal(logits, before)


def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    rng = random.Random(3)
    histories = [TokenHistory(random_tokens(rng, 9), random_tokens(rng, n)) for n in range(20)]
    chunks = [sampling_chunk(random_params(rng), h.num_output, h) for h in histories]
    logits = random_logits(20)
    together = Penalties().adjusted(logits, chunks)
    for row, chunk in enumerate(chunks):
        alone = Penalties().adjusted(logits[row : row + 1], [chunk])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("logit", [0.0, 1.0, -1.0, 3e38, -3e38])
def test_finite_logits_stay_finite(penalty: float, logit: float) -> None:
    logits = torch.full((1, VOCAB), logit)
    params = replace(ALL, repetition_penalty=penalty, logit_bias=((1, 100.0),))
    adjusted = Penalties().adjusted(logits, [sampling_chunk(params, 0, TokenHistory((1, 2)))])
    assert adjusted.isfinite().all()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_as_it_is(broken: float) -> None:
    logits = random_logits(1)
    logits[0, [2, 3]] = broken
    adjusted = Penalties().adjusted(logits, [sampling_chunk(ALL, 1, TokenHistory((2,), (3,)))])
    assert adjusted[0, [2, 3]].tolist() == pytest.approx([broken, broken], nan_ok=True)
