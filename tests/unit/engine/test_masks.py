import math

import pytest
import torch

from mixfleet_engine.grammar import Grammars, GrammarState
from mixfleet_engine.history import TokenHistory
from mixfleet_engine.masks import masked
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sampler import Sampler
from mixfleet_engine.step import NO_TOKEN, PlannedChunk
from support.byte_tokenizer import ByteTokenizer
from support.engine_requests import make_request

VOCAB = 301
BYTES = ByteTokenizer()


def state(grammar: str) -> GrammarState:
    return Grammars(BYTES, VOCAB).start(make_request(stops=[257], grammar=grammar))


def chunk(
    grammar: GrammarState | None = None, sampling: SamplingParams | None = None
) -> PlannedChunk:
    return PlannedChunk(
        request_id="r",
        token_ids=(1,),
        start=0,
        block_table=(0,),
        samples=True,
        sampling=sampling or SamplingParams(),
        history=TokenHistory((1,)),
        position=0,
        grammar=grammar,
    )


def logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def test_without_a_grammar_it_is_the_same_tensor() -> None:
    given = logits(2)
    assert masked(given, [chunk(), chunk()]) is given


def test_rows_with_a_grammar_keep_what_it_allows_and_the_others_all() -> None:
    given = logits(3)
    before = given.clone()
    found = masked(given, [chunk(state("start: /[0-9]/")), chunk(), chunk(state('start: "ab"'))])
    expected = given.clone()
    for row, kept in ((0, b"0123456789"), (2, b"a")):
        expected[row] = -math.inf
        expected[row, list(kept)] = given[row, list(kept)]
    assert torch.equal(found, expected)
    assert torch.equal(given, before)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 2.0, "top_k": 200},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.3},
        {"temperature": 1e-30, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 299, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "presence_penalty": 2.0, "repetition_penalty": 9.0},
        {"temperature": 1.0, "logit_bias": ((200, 100.0), (ord("5"), -100.0))},
    ],
)
def test_no_setting_brings_back_what_the_grammar_took(settings: dict[str, object]) -> None:
    kept = {*b"357"}
    for seed in range(40):
        sampling = SamplingParams(seed=seed, **settings)  # type: ignore[arg-type]
        chunks = [chunk(), chunk(state("start: /[357]/"), sampling)]
        assert Sampler().sample(logits(2), chunks)[1].token_id in kept


def test_at_temperature_0_it_is_the_best_of_the_allowed_tokens() -> None:
    given = logits(1)
    best = max(b"0123456789", key=lambda token_id: float(given[0, token_id]))
    assert Sampler().sample(given, [chunk(state("start: /[0-9]/"))])[0].token_id == best


def test_top_k_counts_the_allowed_tokens_only() -> None:
    given = logits(1)
    best = max(b"0123456789", key=lambda token_id: float(given[0, token_id]))
    for seed in range(20):
        sampling = SamplingParams(temperature=2.0, top_k=1, seed=seed)
        sampled = Sampler().sample(given, [chunk(state("start: /[0-9]/"), sampling)])
        assert sampled[0].token_id == best


def test_log_probabilities_are_those_of_the_model() -> None:
    given = logits(1)
    sampling = SamplingParams(logprobs=2)
    free = Sampler().sample(given, [chunk(None, sampling)])[0].logprobs
    bound = Sampler().sample(given, [chunk(state("start: /[0-9]/"), sampling)])[0]
    assert free is not None
    assert bound.logprobs is not None
    assert bound.logprobs.top == free.top
    expected = given.log_softmax(-1)[0, bound.token_id]
    assert bound.logprobs.logprob == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_found_where_the_grammar_forbids_it(bad: float) -> None:
    given = logits(1)
    given[0, 7] = bad
    assert Sampler().sample(given, [chunk(state('start: "a"'))])[0].token_id == NO_TOKEN
