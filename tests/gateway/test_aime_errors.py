"""What AIME's clients are told when they cannot be served, or their jobs end without answer."""

import threading
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from mixfleet_broker.keys import CHANNEL
from mixfleet_broker.messages import JobEnd
from mixfleet_broker.queue import JobQueue
from support.aime_gateway import client, refused, send
from support.aime_gateway import gateway as gateway
from support.aime_gateway import held as held
from support.aime_gateway import registered as registered
from support.aime_gateway import worker as worker
from support.gateway import GatewayProcess
from support.queue_jobs import MODEL, claim_one
from support.worker_process import until


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_inputs_out_of_their_limits_are_refused_with_the_numbers(gateway: GatewayProcess) -> None:
    aime = client(gateway)
    for params, text in (
        ({"top_k": 0}, "top_k: is 0, must be at least 1"),
        ({"top_k": 1001}, "top_k: is 1001, must be at most 1000"),
        ({"top_k": 1.5}, "top_k: is 1.5, must be a whole number"),
        ({"top_k": True}, "top_k: is True, must be a whole number"),
        ({"top_p": 1.1}, "top_p: is 1.1, must be at most 1.0"),
        ({"temperature": -0.1}, "temperature: is -0.1, must be at least 0.0"),
        ({"temperature": "hot"}, "temperature: is 'hot', must be a number"),
        ({"max_gen_tokens": 0}, "max_gen_tokens: is 0, must be at least 1"),
        ({"prompt_input": 7}, "prompt_input: must be a text, is int"),
        ({"wait_for_result": "later"}, "wait_for_result: is 'later', must be true or false"),
        ({"chat_context": "[1"}, "chat_context: is no JSON"),
        ({"chat_context": {}}, "chat_context: must be a list of turns, is dict"),
        ({"chat_context": [{"role": "tool", "content": ""}]}, "chat_context[0].role: is 'tool'"),
        ({"chat_context": [{"role": "user"}]}, "chat_context[0].content: must be a text"),
        ({"key": 7}, "key: must be a text, is int"),
        ({"image": "x"}, "image: is not known here; known are prompt_input, chat_context,"),
        ({"prompt_input": ""}, "prompt_input: is empty, and so is chat_context"),
    ):
        body = refused(400, aime.post, f"/{MODEL}", **{"prompt_input": "hi", **params})
        assert body["error"].startswith(text), body
        assert body["ep_version"] == 1
    too_long = refused(400, aime.request, prompt_input="hi", max_gen_tokens=2**31)
    assert str(2**31) in too_long["error"]
    response = send("POST", gateway, f"/{MODEL}", data="[")
    assert (response.status_code, response.json()["success"]) == (400, False)


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_unknown_endpoints_are_the_usual_404_and_nothing_is_shadowed(
    gateway: GatewayProcess,
) -> None:
    for path in ("/nothing", "/nothing/progress", "/nothing/login", "/api/endpoints/nothing"):
        response = send("GET", gateway, path)
        assert response.status_code == 404
        assert response.json()["error"]["message"] == f"no such route: GET {path}"
    assert send("POST", gateway, "/livez").status_code == 405
    assert send("GET", gateway, "/livez").json() == {"status": "ok"}
    response = send("DELETE", gateway, f"/{MODEL}")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, POST")


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_jobs_that_are_not_there_are_404(gateway: GatewayProcess) -> None:
    aime = client(gateway)
    assert refused(404, aime.poll, "0" * 32)["code"] == "unknown_job"
    assert refused(400, aime.get, f"/{MODEL}/progress")["error"] == "job_id: is missing"
    refused(400, aime.poll, "09590f11#2")


@pytest.mark.slow
def test_ends_without_an_answer_have_their_status(
    gateway: GatewayProcess, registered: JobQueue
) -> None:
    aime = client(gateway)
    cancelled = aime.submit(prompt_input="hello")
    registered.cancel(cancelled, "no more")
    body = refused(409, aime.poll, cancelled)
    assert (body["job_state"], body["job_id"], body["ep_version"]) == ("canceled", cancelled, 1)
    ends = {
        "engine_failed": (500, "lapsed"),
        "deadline_exceeded": (504, "lapsed"),
        "prompt_too_long": (400, "lapsed"),
    }
    for code, (status, state) in ends.items():
        job_id = aime.submit(prompt_input="hello")
        lease = claim_one(registered).lease
        registered.finish(lease, JobEnd(state="failed", code=code, message="it went wrong"))
        body = refused(status, aime.poll, job_id)
        assert body["job_state"] == state
        assert "it went wrong" in body["error"]


@pytest.mark.slow
def test_a_blocking_call_whose_engine_fails_is_no_success(
    gateway: GatewayProcess, registered: JobQueue
) -> None:
    bodies: list[dict[str, Any]] = []

    def ask() -> None:
        bodies.append(refused(500, client(gateway).request, prompt_input="hello"))

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: registered.depth() == 1, "the job waits")
    failed = JobEnd(state="failed", code="engine_failed", message="out of memory")
    registered.finish(claim_one(registered).lease, failed)
    asking.join(timeout=20)
    [body] = bodies
    assert "out of memory" in body["error"]


@pytest.mark.slow
def test_an_end_is_known_also_when_its_channel_has_gone(
    gateway: GatewayProcess, registered: JobQueue, redis: Redis
) -> None:
    aime = client(gateway)
    failed, done = aime.submit(prompt_input="a"), aime.submit(prompt_input="b")
    end = JobEnd(state="failed", code="engine_failed", message="it went wrong")
    registered.finish(claim_one(registered).lease, end)
    registered.finish(claim_one(registered).lease, JobEnd(state="finished", finish_reason="stop"))
    redis.delete(CHANNEL(failed), CHANNEL(done))
    assert "it went wrong" in refused(500, aime.poll, failed)["error"]
    assert "has expired" in refused(404, aime.poll, done)["error"]


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_a_full_queue_is_503_and_a_full_share_429(redis_url: str, tmp_path: Path) -> None:
    with GatewayProcess(redis_url, tmp_path, "--queue-limit", "1") as gateway:
        client(gateway).submit(prompt_input="one")
        body = refused(503, client(gateway).request, prompt_input="two")
        assert (body["code"], body["details"]["limit"]) == ("queue_full", 1)
    (tmp_path / "other").mkdir()
    with GatewayProcess(redis_url, tmp_path / "other", "--tenant-queue-limit", "1") as gateway:
        assert refused(429, client(gateway).request, prompt_input="two")["details"]["limit"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "[" * 100_000,
        '{"prompt_input": "x", "temperature": NaN}',
        '{"prompt_input": "x", "temperature": Infinity}',
        '{"prompt_input": "x", "top_k": 1' + "0" * 400 + "}",
        '{"prompt_input": "x", "max_gen_tokens": 1' + "0" * 400 + "}",
        '{"prompt_input": "x", "\\ud800": 1}',
        '{"prompt_input": "x", "chat_context": "' + "[" * 100_000 + '"}',
        '{"prompt_input": "x", "chat_context": [[]]}',
        '{"chat_context": [{"role": "\\ud800", "content": ""}]}',
        '{"prompt_input": "x", "key": ["x"]}',
    ],
    ids=range(11),
)
def test_no_body_is_an_error_of_the_gateways_own(gateway: GatewayProcess, body: str) -> None:
    response = send("POST", gateway, f"/{MODEL}", data=body)
    assert response.status_code == 400, response.text[:500]
    assert response.json()["success"] is False
    assert "request_failed" not in gateway.log
