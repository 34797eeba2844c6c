"""What AIME's JavaScript client does, in node, against a real gateway."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from support.aime_gateway import gateway as gateway
from support.aime_gateway import worker as worker
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.key_command import make_key
from support.queue_jobs import MODEL

NODE = shutil.which("node")


@pytest.mark.slow
@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("mode", ["poll", "wait", "login"])
@pytest.mark.usefixtures("worker")
def test_the_javascript_client_gets_its_answer(
    gateway: GatewayProcess, redis_url: str, mode: str
) -> None:
    assert NODE is not None
    secret = make_key(redis_url)["secret"]
    calls = run_node(gateway, secret, mode)
    assert calls["error"] is None
    assert calls["result"]["text"] == "hello from node"
    assert calls["result"]["prompt_length"] == 2
    if mode != "wait":
        first = calls["progress"][0]
        assert (first["progress"], first["queue_position"]) == (0, -1)


@pytest.mark.slow
@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_javascript_client_is_told_of_a_wrong_key(
    gateway: GatewayProcess, redis_url: str
) -> None:
    make_key(redis_url)
    with EchoWorker(redis_url):
        assert "invalid_api_key" in run_node(gateway, "mf-" + "x" * 43, "poll")["error"]


def run_node(gateway: GatewayProcess, secret: str, mode: str) -> dict[str, Any]:
    assert NODE is not None
    script = Path(__file__).parents[1] / "support" / "aime_client.mjs"
    done = subprocess.run(
        [NODE, str(script), gateway.url, MODEL, secret, mode, "hello from node"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    calls: dict[str, Any] = json.loads(done.stdout)
    return calls
