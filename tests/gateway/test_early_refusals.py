"""What is refused before any route is found is refused as the path's own clients read it."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from support.gateway import GatewayProcess

MOST = 3
OPENAI, ANTHROPIC, AIME = "/v1/chat/completions", "/v1/messages", "/mixtral_chat"


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(redis_url, tmp_path, "--max-connections", str(MOST)) as process:
        yield process


def error_as_read(path: str, answer: httpx2.Response) -> dict[str, Any]:
    """Return an error's text and numbers, from where the clients of a path look for them."""
    body: dict[str, Any] = answer.json()
    if path == AIME:
        assert body["success"] is False
        return {"message": body["error"], "details": body.get("details")}
    error: dict[str, Any] = body["error"]
    if path == ANTHROPIC:
        assert body["type"] == "error"
        assert body["request_id"] == answer.headers["request-id"]
    else:
        assert set(error) - {"details"} == {"message", "type", "param", "code"}
    return error


@pytest.mark.slow
@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC, AIME])
def test_a_gateway_with_all_its_connections_says_when_to_come_back(
    gateway: GatewayProcess, path: str
) -> None:
    with ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port)))
        with gateway.client() as client:
            refused = client.post(path, json={})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["connection"] == "close"
        assert refused.headers["x-request-id"]
        error = error_as_read(path, refused)
        assert error["details"] == {"connections": MOST + 1, "limit": MOST}
        assert f"the limit is {MOST}" in error["message"]
    with gateway.client() as client:
        assert client.get("/livez").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC, AIME])
def test_bodies_and_hosts_are_refused_in_the_words_of_the_path(
    gateway: GatewayProcess, path: str
) -> None:
    with gateway.client() as client:
        large = client.post(path, content=b" " * (5 << 20))
        assert large.status_code == 413
        assert error_as_read(path, large)["details"] == {"limit": 4 << 20}
        strange = client.post(path, json={}, headers={"host": "evil.example"})
        assert strange.status_code == 403
        assert "evil.example" in error_as_read(path, strange)["message"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/tokenize", "/nowhere/at/all"])
def test_other_paths_have_the_usual_error(gateway: GatewayProcess, path: str) -> None:
    with gateway.client() as client:
        answer = client.post(path, content=b" " * (5 << 20))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
