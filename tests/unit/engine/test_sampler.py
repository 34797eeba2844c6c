"""The vectorised sampler against a slow one that follows the words of the settings."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mixfleet_engine.history import TokenHistory
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampler import Sampler
from mixfleet_engine.step import NO_TOKEN
from support.slow_sampler import fresh_sample as sample
from support.slow_sampler import sampling_chunk, slow_adjusted, slow_token

GREEDY = SamplingParams()
VOCAB = 64
SEEDS = range(50)


def random_logits(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.8, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 2, 5, 40, VOCAB, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.95, 0.9, 0.5, 0.1]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.3]),
        seed=rng.getrandbits(64),
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_mix_of_settings_matches_the_slow_sampler(seed: int) -> None:
    rng = random.Random(seed)
    params = [random_params(rng) for _ in range(100)]
    positions = [rng.randrange(1000) for _ in params]
    logits = random_logits(len(params), seed)
    expected = [
        slow_token(row, p, position)
        for row, p, position in zip(logits.tolist(), params, positions, strict=True)
    ]
    assert sample(logits, params, positions) == expected


def test_greedy_is_the_argmax_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [9, 5, 40]] = 2.0
    assert sample(logits, [GREEDY, GREEDY], [0, 0]) == [5, 0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-9),
        SamplingParams(temperature=1.0, top_p=0.0),
        SamplingParams(temperature=1e-6),
        SamplingParams(temperature=1e-300),
    ],
)
def test_settings_that_leave_one_token_are_greedy(params: SamplingParams) -> None:
    logits = random_logits(20)
    positions = list(range(20))
    assert sample(logits, [params] * 20, positions) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.6}])
def test_ties_at_the_edge_of_a_filter_go_to_the_lower_ids(settings: dict[str, float]) -> None:
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, [3, 20, 33, 60]] = 1.0
    seen = {
        sample(logits, [SamplingParams(temperature=1.0, seed=s, **settings)], [0])[0]  # type: ignore[arg-type]
        for s in range(100)
    }
    assert seen == {3, 20}


def test_top_p_is_taken_of_what_top_k_left() -> None:
    # 0.4, 0.3, 0.2, 0.1: of the best two, 4/7 is more than a half, so the first stands alone.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    both = [SamplingParams(temperature=1.0, top_k=2, top_p=0.5, seed=s) for s in range(50)]
    assert {sample(logits, [p], [0])[0] for p in both} == {0}
    only_p = [SamplingParams(temperature=1.0, top_p=0.5, seed=s) for s in range(50)]
    assert {sample(logits, [p], [0])[0] for p in only_p} == {0, 1}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def everything(rng: random.Random) -> SamplingParams:
    """Settings of which any may be on."""
    return replace(
        random_params(rng),
        repetition_penalty=rng.choice([1.0, 1.2]),
        presence_penalty=rng.choice([0.0, 0.6]),
        frequency_penalty=rng.choice([0.0, 0.2]),
        logit_bias=rng.choice([(), ((3, 2.5), (60, -1.0))]),
        logprobs=rng.choice([None, 0, 5]),
    )


@pytest.mark.parametrize(
    ("num_rows", "vocab"), [(2, 50257), (7, 32000), (32, 5003), (2, VOCAB), (7, VOCAB), (32, VOCAB)]
)
def test_a_row_does_not_depend_on_the_rows_around_it(
    num_rows: int, vocab: int, threads: int
) -> None:
    """Alone, among others and in another order, with tokens and log-probabilities bit by bit."""
    rng = random.Random(num_rows * threads)
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, vocab, generator=generator) * 3
    histories = [
        TokenHistory(tuple(rng.choices(range(VOCAB), k=9)), tuple(rng.choices(range(VOCAB), k=row)))
        for row in range(num_rows)
    ]
    chunks = [sampling_chunk(everything(rng), h.num_output, h) for h in histories]
    together = Sampler().sample(logits, chunks)
    order = rng.sample(range(num_rows), num_rows)
    shuffled = Sampler().sample(logits[order], [chunks[row] for row in order])
    assert shuffled == [together[row] for row in order]
    for row in order[:6]:
        assert Sampler().sample(logits[row : row + 1], [chunks[row]]) == together[row : row + 1]


@pytest.mark.parametrize("seed", range(3))
def test_bias_and_penalties_come_before_temperature_and_filters(seed: int) -> None:
    rng = random.Random(seed)
    logits = random_logits(40, seed)
    prompt, answer = tuple(range(20)), tuple(rng.choices(range(10, 40), k=15))
    chunks = [
        sampling_chunk(everything(rng), len(answer), TokenHistory(prompt, answer))
        for _ in range(len(logits))
    ]
    expected = [
        slow_token(slow_adjusted(row, c.sampling, prompt, answer), c.sampling, len(answer))
        for row, c in zip(logits.tolist(), chunks, strict=True)
    ]
    assert [token.token_id for token in Sampler().sample(logits, chunks)] == expected


def test_greedy_is_the_argmax_after_penalties() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [4, 9, 30]] = torch.tensor([2.0, 3.0, 2.0])
    once = TokenHistory((1,), (9,))
    chunks = [sampling_chunk(SamplingParams(presence_penalty=1.0), 1, once)]
    assert Sampler().sample(logits, chunks)[0].token_id == 4, "9 is down at a tie, and 4 is lower"


def test_an_answer_with_a_hard_repetition_penalty_says_everything_once() -> None:
    """One sampler through all steps of an answer, as in an engine."""
    logits, history, sampler = random_logits(1), TokenHistory((0,)), Sampler()
    params = SamplingParams(repetition_penalty=1e6, presence_penalty=2.0, logit_bias=((0, -100.0),))
    for position in range(30):
        token = sampler.sample(logits.abs(), [sampling_chunk(params, position, history)])[0]
        history.token_ids.append(token.token_id)
    best = logits[0].abs().sort(descending=True).indices.tolist()
    assert history.token_ids[1:] == [token for token in best if token != 0][:30]


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9}]
)
def test_frequencies_follow_the_probabilities(settings: dict[str, float]) -> None:
    logits = random_logits(1, spread=1.0)
    params = SamplingParams(temperature=0.7, seed=42, **settings)  # type: ignore[arg-type]
    draws = 20_000
    tokens = sample(logits.expand(draws, -1), [params] * draws, list(range(draws)))
    counts = torch.tensor(tokens).bincount(minlength=VOCAB)
    expected = slow_probabilities(logits[0] / 0.7, params) * draws
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[kept].sum().item()
    freedom = int(kept.sum()) - 1
    # Wilson and Hilferty's cube: 99.9 % of fair samplers stay below.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


def slow_probabilities(scaled: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    shares, order = scaled.double().softmax(-1).sort(descending=True)
    shares[params.top_k or VOCAB :] = 0
    shares /= shares.sum()
    shares[shares.cumsum(-1) - shares >= params.top_p] = 0
    shares[shares < params.min_p * shares[0]] = 0
    return torch.zeros_like(shares).scatter(0, order, shares / shares.sum())


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(3)
    before = logits.clone()
    sample(logits, [SamplingParams(temperature=1.0, top_k=3, top_p=0.5)] * 3, [0, 1, 2])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, top_p=0.9)])
def test_a_row_that_is_not_finite_gives_no_token_and_hurts_no_other(
    broken: float, params: SamplingParams
) -> None:
    logits = random_logits(3)
    expected = sample(logits, [params] * 3, [0, 1, 2])
    logits[1, 5] = broken
    assert sample(logits, [params] * 3, [0, 1, 2]) == [expected[0], NO_TOKEN, expected[2]]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.0, top_k=5, min_p=0.1)])
def test_a_row_without_a_possible_token_gives_none(params: SamplingParams) -> None:
    logits = random_logits(2)
    expected = sample(logits, [params] * 2, [0, 0])
    logits[0] = -math.inf
    assert sample(logits, [params] * 2, [0, 0]) == [NO_TOKEN, expected[1]]


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_tokens_that_cannot_be_chosen_are_no_error(settings: dict[str, float]) -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, 7] = 1.0
    params = SamplingParams(temperature=1.0, **settings)  # type: ignore[arg-type]
    assert sample(logits, [params], [0]) == [7]


def test_a_bias_bans_and_forces_tokens() -> None:
    logits = random_logits(1)
    best = int(logits.argmax())
    banned = [SamplingParams(temperature=1.0, seed=s, logit_bias=((best, -100.0),)) for s in SEEDS]
    forced = [SamplingParams(temperature=1.0, seed=s, logit_bias=((11, 100.0),)) for s in SEEDS]
    assert best not in sample(logits.expand(50, -1), banned, [0] * 50)
    assert set(sample(logits.expand(50, -1), forced, [0] * 50)) == {11}


@pytest.mark.parametrize("num_rows", [2, 8])
def test_wide_and_narrow_rows_go_together(num_rows: int) -> None:
    """A flat row needs the whole vocabulary, a peaked one does not; each gets its token alike."""
    logits = torch.randn(num_rows, 20_000, generator=torch.Generator().manual_seed(0))
    logits[::2] *= 6
    params = [SamplingParams(temperature=1.0, top_p=0.95, seed=s) for s in range(num_rows)]
    expected = [slow_token(row, p, 5) for row, p in zip(logits.tolist(), params, strict=True)]
    assert sample(logits, params, [5] * num_rows) == expected


def test_no_rows_give_no_tokens() -> None:
    assert Sampler().sample(torch.empty(0, VOCAB), []) == []
