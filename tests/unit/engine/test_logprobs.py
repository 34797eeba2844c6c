"""Log-probabilities against torch's log-softmax over a full, stable sort."""

import math
from collections.abc import Sequence

import pytest
import torch

from mixfleet_engine.logprobs import token_logprobs
from mixfleet_engine.request import SamplingParams, TokenLogprobs
from mixfleet_engine.step import NO_TOKEN
from support.slow_sampler import fresh_tokens

VOCAB = 64 * 70 + 9


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def slow_logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    exact = logits.double().log_softmax(-1)
    order = logits.sort(descending=True, stable=True).indices[:num_top].tolist()
    return TokenLogprobs(
        logprob=exact[token_id].item(), top=tuple((t, exact[t].item()) for t in order)
    )


def assert_close(found: TokenLogprobs, expected: TokenLogprobs) -> None:
    assert found.logprob == pytest.approx(expected.logprob, rel=1e-5, abs=2e-6)
    assert [token for token, _ in found.top] == [token for token, _ in expected.top]
    values = [value for _, value in expected.top]
    assert [value for _, value in found.top] == pytest.approx(values, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("num_top", [[0, 0], [20, 3], [1, 20]])
@pytest.mark.parametrize("rounded", [False, True])
def test_logprobs_agree_with_a_log_softmax(num_top: Sequence[int], rounded: bool) -> None:
    logits = random_logits(2).round() if rounded else random_logits(2)
    token_ids = [17, VOCAB - 1]
    for row, found in enumerate(token_logprobs(logits, token_ids, num_top)):
        assert_close(found, slow_logprobs(logits[row], token_ids[row], num_top[row]))


def test_ties_go_to_the_lower_ids() -> None:
    found = token_logprobs(torch.zeros(1, VOCAB), [5], [3])[0]
    assert [token for token, _ in found.top] == [0, 1, 2]
    assert found.logprob == pytest.approx(-math.log(VOCAB))


def test_more_than_the_vocabulary_gives_all_of_it() -> None:
    found = token_logprobs(torch.tensor([[0.0, 2.0, 1.0]]), [0], [20])[0]
    assert [token for token, _ in found.top] == [1, 2, 0]


def test_they_are_the_models_own_whatever_was_done_to_the_choice() -> None:
    logits = random_logits(1)
    params = SamplingParams(
        temperature=3.0,
        top_k=2,
        repetition_penalty=2.0,
        presence_penalty=1.0,
        logit_bias=((7, 100.0),),
        logprobs=4,
    )
    token = fresh_tokens(logits, [params], [3])[0]
    assert token.token_id == 7
    assert token.logprobs is not None
    assert_close(token.logprobs, slow_logprobs(logits[0], 7, 4))


def test_only_rows_that_ask_get_them() -> None:
    params = [SamplingParams(), SamplingParams(logprobs=0), SamplingParams(logprobs=2)]
    tokens = fresh_tokens(random_logits(3), params, [0] * 3)
    lengths = [None if t.logprobs is None else len(t.logprobs.top) for t in tokens]
    assert lengths == [None, 0, 2]


def test_a_row_that_is_not_finite_has_none_and_hurts_no_other() -> None:
    logits, params = random_logits(3), [SamplingParams(logprobs=2)] * 3
    expected = fresh_tokens(logits, params, [0] * 3)
    logits[1, 5] = math.nan
    found = fresh_tokens(logits, params, [0] * 3)
    assert (found[1].token_id, found[1].logprobs) == (NO_TOKEN, None)
    assert (found[0], found[2]) == (expected[0], expected[2])


@pytest.mark.parametrize("rows", [2, 7, 32])
def test_a_row_does_not_depend_on_the_rows_around_it(rows: int) -> None:
    logits = random_logits(rows)
    together = token_logprobs(logits, list(range(rows)), [5] * rows)
    for row in range(rows):
        assert token_logprobs(logits[row : row + 1], [row], [2])[0].logprob == together[row].logprob
