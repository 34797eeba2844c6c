"""Whole replies and streams of OpenAI's dialect, byte for byte as they were agreed upon."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
TEXT = 'Say "é"\n🙂'
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": "Echo."}, {"role": "user", "content": TEXT}]},
    ),
    "completions": ("/v1/completions", {"prompt": TEXT}),
}


@pytest.fixture
def http(redis_url: str, tmp_path: Path) -> Iterator[httpx2.Client]:
    with (
        EchoWorker(redis_url, "tiny"),
        GatewayProcess(redis_url, tmp_path) as gateway,
        gateway.client() as http,
    ):
        yield http


@pytest.mark.parametrize("kind", sorted(REQUESTS))
def test_a_whole_reply_is_as_agreed(http: httpx2.Client, kind: str) -> None:
    path, body = REQUESTS[kind]
    response = http.post(path, json={"model": "tiny", "n": 2, **body})
    assert response.headers["content-type"] == "application/json"
    check(f"openai_{kind}.json", [response.text])


@pytest.mark.parametrize("kind", sorted(REQUESTS))
def test_a_stream_is_as_agreed(http: httpx2.Client, kind: str) -> None:
    path, body = REQUESTS[kind]
    asked = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    response = http.post(path, json={**asked, **body})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.removesuffix("\n\n").split("\n\n")
    # Comments tell of the wait, which is never twice the same.
    data = [event.removeprefix("data: ") for event in events if not event.startswith(":")]
    assert data.pop() == "[DONE]"
    check(f"openai_{kind}_stream.json", data)


def check(name: str, documents: list[str]) -> None:
    """Compare with the golden file, ids and times masked."""
    masked = [
        re.sub(r'"created":\d+', '"created":0', re.sub(r"-[0-9a-f]{32}", "-ID", document))
        for document in documents
    ]
    found = [json.loads(document) for document in masked]
    # The order of the fields too: people read these.
    expected = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    assert json.dumps(found) == json.dumps(expected)
