"""What is refused, and in which words, as Anthropic's client hears it."""

import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import Anthropic

from support.answer_worker import AnswerWorker
from support.anthropic_requests import IMAGE, MODEL, QUESTION, ask, text_block


def _with_block(block: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [text_block("x"), block]}]}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (_with_block(IMAGE), "messages.0.content.1: blocks of the type `image` are not served"),
        (_with_block({"type": "thinking"}), "blocks of the type `thinking` are not served"),
        (
            _with_block({"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}),
            "content.0: blocks of the type `image` are not served",
        ),
        (
            _with_block({"type": "tool_use", "id": "x", "name": "f", "input": {}}),
            "messages.0: content.1: a `tool_use` block cannot be the user's",
        ),
        ({"thinking": {"type": "adaptive"}}, "thinking: this parameter is not known here"),
        ({"service_tier": "auto"}, "service_tier: this parameter is not known here"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": []}]}, "must have at least one block"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"extra_body": {"temperature": 3}}, "temperature=3"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        (
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            "tool_choice.auto.disable_parallel_tool_use",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools.0.input_schema: Field required",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(
    client: Anthropic, worker: AnswerWorker, more: dict[str, Any], text: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, **more)
    assert isinstance(caught.value.body, dict)
    error = caught.value.body["error"]
    assert error["type"] == "invalid_request_error"
    assert text in error["message"]
    assert caught.value.body["request_id"] == caught.value.request_id
    assert worker.jobs == []


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (_with_block({"type": "\ud83d"}), "blocks of the type `\\ud83d` are not served"),
        ({"tool_choice": {"type": "\ud83d"}}, "tool_choice: "),
        ({"system": "\ud83d"}, "lone surrogate"),
    ],
)
def test_half_a_surrogate_pair_is_refused_like_anything_else(
    url: str, more: dict[str, Any], text: str
) -> None:
    # Anthropic's client cannot send it, others' can.
    body = json.dumps({"model": MODEL, "max_tokens": 50, "messages": QUESTION} | more)
    headers = {"content-type": "application/json"}
    response = httpx2.post(f"{url}/v1/messages", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert text in response.json()["error"]["message"]


def test_max_tokens_must_be_given(url: str) -> None:
    response = httpx2.post(f"{url}/v1/messages", json={"model": MODEL, "messages": QUESTION})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "max_tokens: Field required"


def test_unknown_models_and_routes_are_not_found(client: Anthropic, url: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ask(client, model="nobody"),
        lambda: client.messages.count_tokens(model="nobody", messages=QUESTION),
        lambda: client.messages.batches.list(),
    ]
    for call in calls:
        with pytest.raises(anthropic.NotFoundError) as caught:
            call()
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "not_found_error"
    assert "error" in httpx2.get(f"{url}/nowhere").json()
