"""Plain completions of a real tiny model, read by OpenAI's own client."""

import asyncio
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types import Completion

from support.gateway import GatewayProcess
from support.openai_client import async_openai_client
from support.openai_fleet import CONTEXT_LENGTH, END_ID, MODEL
from support.openai_fleet import client as client
from support.openai_fleet import fleet as fleet

pytestmark = pytest.mark.slow

PROMPT = "the quick brown fox"
OTHER = "once upon a time, naïve"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


def whole(client: OpenAI, **request: Any) -> Completion:
    answer = client.completions.create(**GREEDY | request)
    assert isinstance(answer, Completion)
    return answer


def streamed(client: OpenAI, **request: Any) -> list[Completion]:
    return list(client.completions.create(stream=True, **GREEDY | request))


def texts(answer: Completion) -> list[str]:
    return [choice.text for choice in answer.choices]


def texts_of(found: list[Completion], num_choices: int) -> list[str]:
    parts = [""] * num_choices
    for chunk in found:
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    return parts


def tokenize(fleet: GatewayProcess, **body: Any) -> Any:
    return post(fleet, "/tokenize", body).json()


def post(fleet: GatewayProcess, path: str, body: Any) -> httpx2.Response:
    with fleet.client() as client:
        return client.post(path, json=body)


def test_a_prompt_is_continued_by_sixteen_tokens_unless_said_otherwise(client: OpenAI) -> None:
    answer = whole(client, prompt=PROMPT)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    found = streamed(client, prompt=PROMPT)
    assert texts_of(found, 1) == texts(answer)
    assert [c.choices[0].finish_reason for c in found][-2:] == [None, "length"]


def test_texts_and_their_tokens_are_continued_alike(client: OpenAI, fleet: GatewayProcess) -> None:
    expected = [texts(whole(client, prompt=text))[0] for text in (PROMPT, OTHER)]
    assert expected[0] != expected[1]
    ids = [tokenize(fleet, prompt=text)["tokens"] for text in (PROMPT, OTHER)]
    assert texts(whole(client, prompt=[PROMPT, OTHER])) == expected
    assert texts(whole(client, prompt=ids[0])) == expected[:1]
    assert texts(whole(client, prompt=ids)) == expected
    assert texts_of(streamed(client, prompt=ids), 2) == expected


def test_choices_come_prompt_by_prompt_and_each_prompt_counts_once(client: OpenAI) -> None:
    sampled: dict[str, Any] = {"temperature": 1.5, "seed": 3, "n": 2}
    alone = [whole(client, prompt=text, **sampled) for text in (PROMPT, OTHER)]
    both = whole(client, prompt=[PROMPT, OTHER], **sampled)
    assert texts(both) == texts(alone[0]) + texts(alone[1])
    assert len(set(texts(both))) == 4
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    usages = [answer.usage for answer in alone if answer.usage is not None]
    assert both.usage is not None
    assert both.usage.prompt_tokens == sum(usage.prompt_tokens for usage in usages)
    assert both.usage.completion_tokens == sum(usage.completion_tokens for usage in usages)
    found = streamed(
        client, prompt=[PROMPT, OTHER], stream_options={"include_usage": True}, **sampled
    )
    assert texts_of(found, 4) == texts(both)
    assert found[-1].choices == []
    assert found[-1].usage == both.usage


def test_the_async_client_reads_the_same(client: OpenAI, fleet: GatewayProcess) -> None:
    async def read() -> tuple[list[str], list[str]]:
        async with async_openai_client(fleet) as own:
            answer = await own.completions.create(**GREEDY, prompt=PROMPT)
            stream = await own.completions.create(**GREEDY, prompt=PROMPT, stream=True)
            return texts(answer), texts_of([chunk async for chunk in stream], 1)

    expected = texts(whole(client, prompt=PROMPT))
    assert asyncio.run(read()) == (expected, expected)


def test_the_prompt_comes_before_its_answer_if_it_is_echoed(client: OpenAI) -> None:
    plain = texts(whole(client, prompt=[PROMPT, OTHER]))
    expected = [PROMPT + plain[0], OTHER + plain[1]]
    assert texts(whole(client, prompt=[PROMPT, OTHER], echo=True)) == expected
    assert texts_of(streamed(client, prompt=[PROMPT, OTHER], echo=True), 2) == expected


def test_a_stop_string_ends_the_answer(client: OpenAI) -> None:
    text = texts(whole(client, prompt=PROMPT))[0]
    stop = text[len(text) // 2 :][:2]
    answer = whole(client, prompt=PROMPT, stop=stop)
    assert texts(answer) == [text[: text.index(stop)]]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_are_lists_side_by_side(client: OpenAI) -> None:
    answer = whole(client, prompt=PROMPT, logprobs=2, max_tokens=8)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert len(found.tokens) == 8
    for token, logprob, top in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        assert top[token] == max(top.values()) == logprob
    assert max(map(len, found.top_logprobs)) == 2
    text = texts(answer)[0]
    for token, offset in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert text[offset:].startswith(token)
    chunks = streamed(client, prompt=PROMPT, logprobs=2, max_tokens=8)
    lists = [c.choices[0].logprobs for c in chunks]
    assert [t for one in lists if one for t in one.tokens or ()] == found.tokens
    assert [o for one in lists if one for o in one.text_offset or ()] == found.text_offset


def test_the_token_that_ends_a_text_has_no_log_probability(client: OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "logprobs": 2, "logit_bias": {str(END_ID): 100}}
    answer = whole(client, **asked)
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 1)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == []
    assert [c.choices[0].logprobs for c in streamed(client, **asked)] == [None]


@pytest.mark.parametrize(
    ("param", "request_"),
    [
        ("suffix", {"prompt": PROMPT, "suffix": " the end"}),
        ("best_of", {"prompt": PROMPT, "best_of": 3}),
        ("best_of", {"prompt": PROMPT, "best_of": 1, "n": 2}),
        ("echo", {"prompt": PROMPT, "echo": True, "logprobs": 1}),
        ("echo", {"prompt": [1, 2], "echo": True}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ["a", 1]}),
        ("prompt", {"prompt": [PROMPT] * 65, "n": 2}),
        ("logprobs", {"prompt": PROMPT, "logprobs": 21}),
        ("bogus", {"prompt": PROMPT, "extra_body": {"bogus": 1}}),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_name(
    client: OpenAI, param: str, request_: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        whole(client, **request_)
    assert caught.value.param == param
    assert caught.value.message.count(f"{param}: ")


def test_best_of_all_choices_is_all_choices(client: OpenAI) -> None:
    assert len(whole(client, prompt=PROMPT, n=2, best_of=2, suffix="").choices) == 2


def test_one_prompt_too_long_refuses_the_request_and_nothing_is_queued(
    client: OpenAI, fleet: GatewayProcess
) -> None:
    before = fleet.log.count("state=failed")
    with pytest.raises(openai.BadRequestError) as caught:
        whole(client, prompt=[PROMPT, "words " * 200])
    assert caught.value.code == "context_length_exceeded"
    assert str(CONTEXT_LENGTH) in caught.value.message
    assert fleet.log.count("state=failed") == before


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        whole(client, prompt=PROMPT, model="gpt-9")
    assert caught.value.code == "model_not_found"


def test_a_text_becomes_tokens_and_a_text_again(fleet: GatewayProcess) -> None:
    found = tokenize(fleet, model=MODEL, prompt=OTHER, add_special_tokens=False)
    assert found["count"] == len(found["tokens"]) > 0
    assert found["max_model_len"] == CONTEXT_LENGTH
    assert found["token_strs"] is None
    back = post(fleet, "/detokenize", {"model": MODEL, "tokens": found["tokens"]})
    assert back.json() == {"prompt": OTHER}
    named = tokenize(fleet, prompt="plain words", return_token_strs=True)
    # The control token that comes before every prompt goes by its name.
    assert "".join(named["token_strs"][1:]) == "plain words"
    assert named["token_strs"][0] == "<|im_start|>"


def test_messages_become_the_prompt_that_they_are_answered_as(
    client: OpenAI, fleet: GatewayProcess
) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    found = tokenize(fleet, model=MODEL, messages=messages)
    usage = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1).usage
    assert usage is not None
    assert found["count"] == usage.prompt_tokens
    prompt = whole(client, prompt=found["tokens"], max_tokens=8)
    chat = client.chat.completions.create(**GREEDY, messages=messages, max_tokens=8)
    assert texts(prompt) == [chat.choices[0].message.content]


@pytest.mark.parametrize(
    ("path", "param", "body"),
    [
        ("/tokenize", "prompt", {}),
        ("/tokenize", "prompt", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        (
            "/tokenize",
            "add_generation_prompt",
            {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False},
        ),
        ("/tokenize", "chat_template", {"prompt": "a", "chat_template": "x"}),
        ("/detokenize", "tokens", {}),
    ],
)
def test_questions_about_tokens_are_refused_by_name(
    fleet: GatewayProcess, path: str, param: str, body: dict[str, Any]
) -> None:
    response = post(fleet, path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
