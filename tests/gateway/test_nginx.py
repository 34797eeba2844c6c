"""A real nginx before a gateway, with the configuration that we ship."""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from mixfleet_broker.api_keys import ApiKeys
from mixfleet_broker.connection import connect
from mixfleet_broker.key_records import KeyTerms
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.queue_jobs import MODEL
from support.worker_process import until

CHAT = "/v1/chat/completions"
SHIPPED = Path(__file__).parents[2] / "deploy" / "nginx" / "mixfleet.conf"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
MAIN = """
daemon off;
master_process off;
error_log stderr;
pid {directory}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {site}
}}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="no nginx: `apt-get install nginx-light`"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def site(gateway_port: int, port: int) -> str:
    """The shipped configuration, at other ports."""
    text = SHIPPED.read_text()
    for old, new in (
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("server 127.0.0.1:8000;", f"server 127.0.0.1:{gateway_port};"),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.fixture
def worker(redis_url: str) -> Iterator[EchoWorker]:
    """It says one token and waits to be let go."""
    with EchoWorker(redis_url, hold_after=1) as echo:
        yield echo


@pytest.fixture
def proxied(redis_url: str, worker: EchoWorker, tmp_path: Path) -> Iterator[httpx2.Client]:  # noqa: ARG001
    """A client of nginx, behind which is a gateway."""
    assert NGINX is not None
    port = free_port()
    with connect(redis_url) as redis:
        _, secret = ApiKeys(redis).create(KeyTerms(name="test"), None)
    with GatewayProcess(redis_url, tmp_path, "--require-key", "on") as gateway:
        config = tmp_path / "nginx.conf"
        config.write_text(MAIN.format(directory=tmp_path, site=site(gateway.port, port)))
        with (tmp_path / "nginx.log").open("wb") as log:
            process = subprocess.Popen(
                [NGINX, "-p", str(tmp_path), "-c", str(config)], stdout=log, stderr=log
            )
        base = f"http://127.0.0.1:{port}"
        try:
            with httpx2.Client(
                base_url=base,
                headers={"authorization": f"Bearer {secret}", "host": "chat.example"},
                trust_env=False,
                timeout=20.0,
            ) as client:
                until(lambda: answers(client), "nginx answers")
                yield client
        finally:
            process.terminate()
            process.wait()


def answers(client: httpx2.Client) -> bool:
    try:
        return client.get("/livez").status_code == 200
    except httpx2.HTTPError:
        return False


def chat(text: str) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]}


def test_a_stream_comes_through_chunk_by_chunk(proxied: httpx2.Client, worker: EchoWorker) -> None:
    texts = []
    with proxied.stream("POST", CHAT, json={**chat("hello"), "stream": True}) as stream:
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert "nginx" in stream.headers["server"]
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            texts.append(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))
            if "".join(texts) == "h":
                # The first token is here while the job is held, so nothing gathers chunks.
                assert not worker.go.is_set()
                worker.go.set()
    assert "".join(texts) == "hello"


def test_a_client_of_nginx_that_goes_away_ends_its_job(
    proxied: httpx2.Client, worker: EchoWorker
) -> None:
    with proxied.stream("POST", CHAT, json={**chat("hello"), "stream": True}) as stream:
        job_id = stream.headers["x-job-id"]
        lines = stream.iter_lines()
        while '"h"' not in next(lines):
            pass
    until(
        lambda: proxied.get(f"/v1/jobs/{job_id}").json()["state"] == "canceled",
        "the job is cancelled",
    )
    assert not worker.go.is_set()


def test_errors_of_the_gateway_are_passed_on(proxied: httpx2.Client, worker: EchoWorker) -> None:
    worker.go.set()
    large = proxied.post(CHAT, json=chat("x" * (9 << 19)))
    assert large.status_code == 413
    assert large.json()["error"]["code"] == "body_too_large"
    answer = proxied.post(CHAT, json=chat("hi"))
    assert answer.json()["choices"][0]["message"]["content"] == "hi"
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
