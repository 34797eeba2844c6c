import math

import pytest

from mixfleet_engine.errors import InvalidRequestError, PromptTooLongError
from mixfleet_engine.request import GenerateRequest, SamplingParams
from mixfleet_engine.request_check import check_request
from support.engine_requests import make_request


def check(request: GenerateRequest) -> None:
    check_request(request, vocab_size=10, context_length=8)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=2.5, top_k=1_000_000, top_p=1e-9, seed=2**64 - 1),
        SamplingParams(min_p=1.0, repetition_penalty=1e-9, logprobs=0),
        SamplingParams(presence_penalty=2.0, frequency_penalty=-2.0, logprobs=20),
        SamplingParams(presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=1e9),
        SamplingParams(logit_bias=((0, -100.0), (9, 100.0))),
    ],
)
def test_values_at_the_edges_are_taken(sampling: SamplingParams) -> None:
    check(make_request(prompt=(0, 9), max_tokens=6, stops=(0, 9), sampling=sampling))


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        (SamplingParams(temperature=-0.1), "temperature=-0.1"),
        (SamplingParams(temperature=math.nan), "temperature=nan"),
        (SamplingParams(temperature=math.inf), "temperature=inf"),
        (SamplingParams(top_k=-1), "top_k=-1"),
        (SamplingParams(top_p=0.0), "top_p=0.0"),
        (SamplingParams(top_p=1.01), "top_p=1.01"),
        (SamplingParams(top_p=math.nan), "top_p=nan"),
        (SamplingParams(min_p=-0.1), "min_p=-0.1: must be from 0 to 1"),
        (SamplingParams(min_p=1.1), "min_p=1.1"),
        (SamplingParams(min_p=math.nan), "min_p=nan"),
        (SamplingParams(repetition_penalty=0.0), "repetition_penalty=0.0: must be above 0"),
        (SamplingParams(repetition_penalty=-1.0), "repetition_penalty=-1.0"),
        (SamplingParams(repetition_penalty=math.inf), "repetition_penalty=inf"),
        (SamplingParams(repetition_penalty=math.nan), "repetition_penalty=nan"),
        (SamplingParams(presence_penalty=2.1), "presence_penalty=2.1: must be from -2 to 2"),
        (SamplingParams(presence_penalty=math.nan), "presence_penalty=nan"),
        (SamplingParams(frequency_penalty=-2.1), "frequency_penalty=-2.1: must be from -2 to 2"),
        (SamplingParams(frequency_penalty=math.nan), "frequency_penalty=nan"),
        (SamplingParams(logprobs=-1), "logprobs=-1: must be from 0 to 20"),
        (SamplingParams(logprobs=21), "logprobs=21"),
        (SamplingParams(logit_bias=((10, 1.0),)), "logit_bias holds 10: token ids go from 0 to 9"),
        (SamplingParams(logit_bias=((-1, 1.0),)), "logit_bias holds -1"),
        (SamplingParams(logit_bias=((3, 100.5),)), r"logit_bias\[3\]=100.5: .* from -100 to 100"),
        (SamplingParams(logit_bias=((3, -math.inf),)), r"logit_bias\[3\]=-inf"),
        (SamplingParams(logit_bias=((3, math.nan),)), r"logit_bias\[3\]=nan"),
        (SamplingParams(logit_bias=((3, 1.0), (3, 1.0))), "logit_bias holds 3 twice"),
        (
            SamplingParams(logit_bias=((3, 1.0),) * 1025),
            "logit_bias has 1025 .* at most 1024",
        ),
        (SamplingParams(seed=-1), "seed=-1"),
        (SamplingParams(seed=2**64), f"seed={2**64}"),
    ],
)
def test_bad_sampling_values_are_named(sampling: SamplingParams, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        check(make_request(sampling=sampling))


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (make_request(prompt=(1, 10)), "prompt_token_ids holds 10: token ids go from 0 to 9"),
        (make_request(prompt=(-1,)), "prompt_token_ids holds -1"),
        (make_request(output=(10,)), "output_token_ids holds 10"),
        (make_request(stops=(11,)), "stop_token_ids holds 11"),
    ],
)
def test_token_ids_outside_of_the_vocabulary_are_named(
    request_: GenerateRequest, named: str
) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        check(request_)


def test_an_empty_prompt_is_refused_even_with_an_answer() -> None:
    with pytest.raises(InvalidRequestError, match="prompt_token_ids is empty"):
        check(make_request(prompt=(), output=(1,)))


@pytest.mark.parametrize(("output", "max_tokens"), [((), 0), ((), -1), ((1,), 1), ((1, 2), 1)])
def test_max_tokens_must_leave_room_for_one_more(output: tuple[int, ...], max_tokens: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"max_tokens={max_tokens}:.*{len(output)} tok"):
        check(make_request(output=output, max_tokens=max_tokens))


def test_an_answer_that_has_its_stop_token_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"output_token_ids\[1\]=7 is a stop token"):
        check(make_request(output=(5, 7), stops=(7,)))


def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers() -> None:
    check(make_request(prompt=(1,) * 4, max_tokens=4))
    with pytest.raises(PromptTooLongError) as caught:
        check(make_request(prompt=(1,) * 4, max_tokens=5))
    error = caught.value
    assert (error.prompt_tokens, error.max_tokens, error.context_length) == (4, 5, 8)


def test_a_continued_answer_counts_only_once_against_the_context() -> None:
    check(make_request(prompt=(1,) * 4, output=(2, 2, 2), max_tokens=4))
