"""Chat completions of a real tiny model, read by OpenAI's own client."""

import asyncio
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from support.gateway import GatewayProcess
from support.openai_client import async_openai_client
from support.openai_fleet import CONTEXT_LENGTH, END_ID, MODEL
from support.openai_fleet import client as client
from support.openai_fleet import fleet as fleet

pytestmark = pytest.mark.slow

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "the quick brown fox"}]
GREEDY: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0}
SEEDED: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 1.5, "seed": 7}


def whole(client: OpenAI, **request: Any) -> ChatCompletion:
    answer = client.chat.completions.create(**request)
    assert isinstance(answer, ChatCompletion)
    return answer


def chunks(client: OpenAI, **request: Any) -> list[ChatCompletionChunk]:
    return list(client.chat.completions.create(stream=True, **request))


def text_of(found: list[ChatCompletionChunk]) -> str:
    return "".join(c.choices[0].delta.content or "" for c in found if c.choices)


def texts(answer: ChatCompletion) -> list[str]:
    return [choice.message.content or "" for choice in answer.choices]


def test_a_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    answer = whole(client, **GREEDY, max_tokens=12)
    found = chunks(client, **GREEDY, max_tokens=12)
    assert text_of(found) == texts(answer)[0] != ""
    assert [c.choices[0].delta.role for c in found] == ["assistant", *[None] * (len(found) - 1)]
    assert [c.choices[0].finish_reason for c in found][-2:] == [None, "length"]
    assert len({c.id for c in found}) == 1
    assert answer.id.startswith("chatcmpl-")
    assert answer.id != found[0].id


def test_the_async_client_reads_the_same(client: OpenAI, fleet: GatewayProcess) -> None:
    async def read() -> tuple[str | None, str]:
        async with async_openai_client(fleet) as own:
            answer = await own.chat.completions.create(**GREEDY, max_tokens=8)
            stream = await own.chat.completions.create(**GREEDY, max_tokens=8, stream=True)
            return answer.choices[0].message.content, text_of([c async for c in stream])

    expected = texts(whole(client, **GREEDY, max_tokens=8))[0]
    assert asyncio.run(read()) == (expected, expected)


def test_usage_is_a_last_chunk_without_choices_and_only_if_asked(client: OpenAI) -> None:
    expected = whole(client, **GREEDY, max_tokens=5).usage
    found = chunks(client, **GREEDY, max_tokens=5, stream_options={"include_usage": True})
    assert found[-1].choices == []
    assert found[-1].usage == expected
    assert expected is not None
    assert expected.completion_tokens == 5
    assert expected.total_tokens == expected.prompt_tokens + 5
    assert all(c.usage is None for c in found[:-1])
    assert all(c.usage is None for c in chunks(client, **GREEDY, max_tokens=5))


def test_both_names_of_the_longest_answer_end_it(client: OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = whole(client, **GREEDY, **{name: 3})
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"


def test_an_answer_ends_before_its_stop_string(client: OpenAI) -> None:
    text = texts(whole(client, **GREEDY, max_tokens=24))[0]
    stop = text[len(text) // 2 :][:2]
    for given in (stop, ["never said, I hope", stop]):
        answer = whole(client, **GREEDY, max_tokens=24, stop=given)
        assert texts(answer) == [text[: text.index(stop)]]
        assert answer.choices[0].finish_reason == "stop"
    found = chunks(client, **GREEDY, max_tokens=24, stop=stop)
    assert text_of(found) == text[: text.index(stop)]
    assert found[-1].choices[0].finish_reason == "stop"


def test_choices_of_one_seed_differ_and_come_again(client: OpenAI) -> None:
    first = whole(client, **SEEDED, n=3, max_tokens=12)
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts(first))) == 3
    assert texts(whole(client, **SEEDED, n=3, max_tokens=12)) == texts(first)
    assert first.usage is not None
    assert first.usage.completion_tokens == 36
    alone = whole(client, **SEEDED, max_tokens=12)
    assert alone.usage is not None
    assert alone.usage.prompt_tokens == first.usage.prompt_tokens
    assert texts(alone) == texts(first)[:1]


def test_streamed_choices_keep_apart(client: OpenAI) -> None:
    expected = texts(whole(client, **SEEDED, n=2, max_tokens=12))
    found = ["", ""]
    for chunk in chunks(client, **SEEDED, n=2, max_tokens=12):
        found[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert found == expected


def test_log_probabilities_are_of_each_token(client: OpenAI) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    logprobs = whole(client, **asked).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 6
    for entry in logprobs.content:
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
    streamed = [
        entry.bytes
        for chunk in chunks(client, **asked)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == [entry.bytes for entry in logprobs.content]


def test_the_token_that_ends_an_answer_has_no_log_probability(client: OpenAI) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    asked["logit_bias"] = {str(END_ID): 100}
    answer = whole(client, **asked)
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 1)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content == []
    assert [c.choices[0].logprobs for c in chunks(client, **asked)] == [None, None]


def test_a_bias_makes_a_token_certain(client: OpenAI) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 4, "logprobs": True}
    logprobs = whole(client, **asked, logit_bias={"70": 100}).choices[0].logprobs
    assert logprobs is not None
    assert len({entry.token for entry in logprobs.content or ()}) == 1


def test_penalties_end_repetition(client: OpenAI) -> None:
    # Both tokens stand far above all others, and one of them above the other.
    asked: dict[str, Any] = {
        **GREEDY,
        "max_tokens": 16,
        "logprobs": True,
        "logit_bias": {"70": 100, "71": 90},
    }

    def tokens(**more: Any) -> set[str]:
        logprobs = whole(client, **asked, **more).choices[0].logprobs
        assert logprobs is not None
        return {entry.token for entry in logprobs.content or ()}

    assert len(tokens()) == 1
    assert len(tokens(frequency_penalty=2, presence_penalty=2)) == 2


def test_an_unknown_model_is_not_found_and_those_served_are_named(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        whole(client, **{**GREEDY, "model": "gpt-9"})
    assert caught.value.code == "model_not_found"
    assert MODEL in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_parameter_is_refused_by_its_name(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY, stream=stream, extra_body={"bogus": 1})
    assert (caught.value.param, caught.value.code) == ("bogus", "unknown_parameter")


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_the_context_is_refused_with_the_numbers(
    client: OpenAI, stream: bool
) -> None:
    request = {**GREEDY, "messages": [{"role": "user", "content": "words " * 200}]}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request, max_tokens=5, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    numbers = [int(word) for word in str(caught.value.message).split() if word.isdigit()]
    assert CONTEXT_LENGTH in numbers
    assert max(numbers) > CONTEXT_LENGTH  # the prompt's own length


def test_top_log_probabilities_need_log_probabilities(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        whole(client, **GREEDY, top_logprobs=2)
    assert caught.value.param == "top_logprobs"
