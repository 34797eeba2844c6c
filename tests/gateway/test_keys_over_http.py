"""API keys as callers of a real gateway meet them."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx2
import pytest
from redis import Redis

from support.answer_worker import AnswerWorker
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.key_command import make_key, mixfleet
from support.queue_jobs import MODEL
from support.worker_process import until

CHAT = "/v1/chat/completions"


def used(url: str, key_id: str) -> dict[str, int]:
    """What remains of a key's limits, by their names."""
    shown = json.loads(mixfleet(url, "key", "show", key_id, "--json").stdout)
    return {state["name"]: state["remaining"] for state in shown["used"]}


def body(text: str = "hello", **more: Any) -> dict[str, Any]:
    chat = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 10}
    return {**chat, **more}


def ask(gateway: GatewayProcess, secret: str = "", **more: Any) -> httpx2.Response:
    headers = more.pop("headers", {})
    with gateway.client(secret) as client:
        return client.post(CHAT, json=body(**more), headers=headers)


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of a refusal, which has the shape that OpenAI's clients read."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    value: dict[str, Any] = response.json()["error"]
    assert set(value) >= {"message", "type", "param", "code"}
    return value


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    make_key(redis_url)  # without one it would not start
    with GatewayProcess(redis_url, tmp_path, "--require-key", "on") as process:
        yield process


@pytest.fixture
def worker(redis_url: str) -> Iterator[EchoWorker]:
    with EchoWorker(redis_url) as echo:
        yield echo


@pytest.fixture
def held(redis_url: str) -> Iterator[EchoWorker]:
    """A worker that says one token and waits to be let go."""
    with EchoWorker(redis_url, hold_after=1) as echo:
        yield echo


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_who_shows_no_key_or_a_wrong_one_is_told_so(
    gateway: GatewayProcess, redis_url: str
) -> None:
    missing = ask(gateway)
    assert error_of(missing, 401)["code"] == "missing_api_key"
    assert missing.headers["www-authenticate"] == "Bearer"
    assert missing.headers["x-should-retry"] == "false"
    for secret in ("mf-" + "x" * 43, "nonsense", "x" * 5000):
        refused = error_of(ask(gateway, secret), 401)
        assert (refused["code"], refused["type"]) == ("invalid_api_key", "authentication_error")
        assert secret not in refused["message"]
    secret = make_key(redis_url)["secret"]
    assert ask(gateway, secret).status_code == 200
    with gateway.client() as client:
        response = client.post(CHAT, json=body(), headers={"x-api-key": secret})
        assert response.status_code == 200
        odd = client.post(CHAT, json=body(), headers={b"authorization": b"Bearer \xff\xfe"})
        assert error_of(odd, 401)["code"] == "invalid_api_key"
    assert secret not in gateway.log


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_key_opens_its_scopes_models_and_priorities_only(
    gateway: GatewayProcess, redis_url: str
) -> None:
    ops = make_key(redis_url, "--scope", "ops")["secret"]
    assert error_of(ask(gateway, ops), 403)["code"] == "scope_missing"
    admin = make_key(redis_url, "--scope", "admin")["secret"]
    assert ask(gateway, admin).status_code == 200
    bound = make_key(redis_url, "--model", "other", "--priority", "batch")["secret"]
    refused = error_of(ask(gateway, bound), 403)
    assert (refused["code"], refused["param"]) == ("model_not_allowed", "model")
    with gateway.client(bound) as client:
        assert client.get("/v1/models").json()["data"] == []
        assert error_of(client.get(f"/v1/models/{MODEL}"), 403)["code"] == "model_not_allowed"
    batch = make_key(redis_url, "--priority", "batch")["secret"]
    higher = {"x-mixfleet-priority": "interactive"}
    assert error_of(ask(gateway, batch, headers=higher), 403)["code"] == "priority_not_allowed"
    assert error_of(ask(gateway, batch, service_tier="priority"), 403)["type"] == "permission_error"
    assert ask(gateway, batch).status_code == 200
    unknown = error_of(ask(gateway, admin, model="nobody"), 404)
    assert unknown["code"] == "model_not_found"
    assert MODEL in unknown["message"]


@pytest.mark.slow
def test_counting_tokens_is_a_request_of_its_key(gateway: GatewayProcess, redis_url: str) -> None:
    made = make_key(redis_url, "--rpm", "3", "--tpm", "5", "--parallel", "1")
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/tokenize", {"model": MODEL, "prompt": "a text of more than five tokens"}),
        ("/detokenize", {"model": MODEL, "tokens": [1, 2, 3]}),
        ("/v1/messages/count_tokens", body()),
    ]
    del asked[2][1]["max_tokens"]
    with AnswerWorker(redis_url), gateway.client(made["secret"]) as client:
        for left, (path, content) in zip((2, 1, 0), asked, strict=True):
            answer = client.post(path, json=content)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        refused = client.post(asked[0][0], json=asked[0][1])
        error = error_of(refused, 429)
        assert (error["code"], error["details"]["name"]) == ("rate_limited", "requests")
        assert int(refused.headers["retry-after"]) >= 1
    remaining = used(redis_url, made["key_id"])
    assert (remaining["tokens"], remaining["jobs"]) == (5, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_two_gateways_count_requests_as_one(
    gateway: GatewayProcess, redis_url: str, tmp_path: Path
) -> None:
    secret = make_key(redis_url, "--rpm", "4")["secret"]
    with GatewayProcess(redis_url, tmp_path, "--require-key", "on") as other:
        both = [gateway, other] * 4
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda where: ask(where, secret), both))
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(served) == 4
    assert {a.headers["x-ratelimit-limit-requests"] for a in answers} == {"4"}
    assert sorted(a.headers["x-ratelimit-remaining-requests"] for a in served) == list("0123")
    for answer in refused:
        error = error_of(answer, 429)
        assert (error["code"], error["type"]) == ("rate_limited", "rate_limit_error")
        assert error["details"] == {"name": "requests", "limit": 4, "load": 4}
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        # One of four a minute comes back after 15 s.
        wait_ms = int(answer.headers["retry-after-ms"])
        assert 10_000 < wait_ms <= 15_000
        assert int(answer.headers["retry-after"]) == -(-wait_ms // 1000)
        assert 40.0 < float(answer.headers["x-ratelimit-reset-requests"].rstrip("s")) <= 60.0


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_tokens_are_charged_at_most_and_settled_after_the_answer(
    gateway: GatewayProcess, redis_url: str
) -> None:
    made = make_key(redis_url, "--tpd", "100")
    # "hello" may be 2 tokens, and its answer 10; it took 1 and 5.
    first = ask(gateway, made["secret"])
    assert first.headers["x-ratelimit-limit-tokens-day"] == "100"
    assert first.headers["x-ratelimit-remaining-tokens-day"] == "88"
    assert first.json()["usage"]["total_tokens"] == 6
    until(lambda: used(redis_url, made["key_id"])["tokens_day"] == 94, "it is settled")
    second = ask(gateway, made["secret"])
    assert second.headers["x-ratelimit-remaining-tokens-day"] == "82"
    large = ask(gateway, made["secret"], max_tokens=500)
    error = error_of(large, 429)
    assert error["code"] == "request_over_limit"
    assert error["details"]["limit"] == 100
    assert large.headers["x-should-retry"] == "false"
    assert "retry-after" not in large.headers


@pytest.mark.slow
def test_a_refused_request_costs_nothing(
    gateway: GatewayProcess, redis_url: str, held: EchoWorker
) -> None:
    made = make_key(redis_url, "--rpm", "50", "--tpd", "1000", "--queued", "1")
    with gateway.client(made["secret"]) as client, ThreadPoolExecutor(1) as pool:
        with client.stream("POST", CHAT, json=body(stream=True)) as stream:
            place = f"/v1/jobs/{stream.headers['x-job-id']}"
            until(lambda: client.get(place).json()["state"] == "started", "it runs")
            waiting = pool.submit(ask, gateway, made["secret"])
            until(lambda: used(redis_url, made["key_id"])["tokens_day"] == 976, "both are charged")
            until(lambda: queued(gateway, made["secret"]) == "tenant_queue_full", "one waits")
            assert used(redis_url, made["key_id"])["tokens_day"] == 976
            held.go.set()
            stream.read()
        assert waiting.result().status_code == 200


@pytest.mark.slow
def test_another_request_under_a_used_idempotency_key_gives_nothing_back(
    gateway: GatewayProcess, redis_url: str, held: EchoWorker
) -> None:
    made = make_key(redis_url, "--rpm", "50", "--tpd", "1000")
    headers = {"idempotency-key": "once", "x-mixfleet-on-disconnect": "continue"}
    with (
        gateway.client(made["secret"]) as client,
        client.stream("POST", CHAT, json=body(stream=True), headers=headers) as stream,
    ):
        charged = used(redis_url, made["key_id"])["tokens_day"]
        conflict = client.post(CHAT, json=body("other"), headers=headers)
        assert error_of(conflict, 409)["code"] == "job_conflict"
        assert used(redis_url, made["key_id"])["tokens_day"] == charged < 1000
        held.go.set()
        stream.read()
    settled = 1000 - len("hello") - 1
    until(lambda: used(redis_url, made["key_id"])["tokens_day"] == settled, "the job is settled")


def queued(gateway: GatewayProcess, secret: str) -> str:
    """The code of the refusal of a job that would have to wait."""
    error = error_of(ask(gateway, secret), 429)
    assert error["details"] == {"unit": "jobs", "depth": 1, "limit": 1, "tenant": ANY}
    return str(error["code"])


@pytest.mark.slow
def test_parallel_jobs_are_bounded_until_one_ends(
    gateway: GatewayProcess, redis_url: str, held: EchoWorker
) -> None:
    made = make_key(redis_url, "--parallel", "2")
    secret = made["secret"]
    with gateway.client(secret) as client, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, gateway, secret) for _ in range(2)]
        until(lambda: used(redis_url, made["key_id"])["jobs"] == 0, "both are counted")
        refused = client.post(CHAT, json=body())
        error = error_of(refused, 429)
        assert error["details"] == {"name": "jobs", "limit": 2, "load": 2}
        assert refused.headers["retry-after"] == "1"
        held.go.set()
        assert [job.result().status_code for job in running] == [200, 200]
        until(lambda: client.post(CHAT, json=body()).status_code == 200, "there is room again")


@pytest.mark.slow
def test_a_job_is_its_own_keys_to_see_and_to_cancel(
    gateway: GatewayProcess, redis_url: str, held: EchoWorker
) -> None:
    mine, theirs = make_key(redis_url)["secret"], make_key(redis_url)["secret"]
    with gateway.client(mine) as client, gateway.client(theirs) as stranger:
        with client.stream("POST", CHAT, json=body(stream=True)) as stream:
            place = f"/v1/jobs/{stream.headers['x-job-id']}"
            until(lambda: client.get(place).json()["state"] == "started", "it runs")
            unknown = error_of(client.get("/v1/jobs/nothing"), 404)
            assert unknown["code"] == "unknown_job"
            for refused in (stranger.get(place), stranger.delete(place)):
                error = error_of(refused, 404)
                assert error["code"] == "unknown_job"
                # Nothing tells another's job from none at all.
                name = place.rpartition("/")[2]
                assert error["message"].replace(name, "nothing") == unknown["message"]
            assert client.get(place).json()["worker"] == "echo"
            assert client.delete(place).json()["outcome"] == "canceled"
            assert client.delete(place).json()["outcome"] == "already_ended"
            lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert json.loads(lines[-1][6:])["error"]["code"] == "canceled"
        job = client.get(place).json()
    assert (job["state"], job["outlook"]) == ("canceled", "ended")
    assert job["error"] == {"code": "canceled", "message": "cancelled by DELETE /v1/jobs"}
    held.go.set()


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_finished_job_says_what_it_took(gateway: GatewayProcess, redis_url: str) -> None:
    secret = make_key(redis_url)["secret"]
    answer = ask(gateway, secret)
    with gateway.client(secret) as client:
        job = client.get(f"/v1/jobs/{answer.headers['x-job-id']}").json()
        bad = client.get("/v1/jobs/a%20b")
    assert job | {"waited_s": 0} == {
        "id": answer.headers["x-job-id"],
        "object": "job",
        "model": MODEL,
        "state": "finished",
        "outlook": "ended",
        "priority": "default",
        "position": None,
        "tokens_ahead": None,
        "eta_s": None,
        "waited_s": 0,
        "attempt": 1,
        "worker": "echo",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 5},
        "error": None,
    }
    assert error_of(bad, 400)["code"] == "invalid_request"


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_revoked_key_is_refused_within_two_seconds(
    gateway: GatewayProcess, redis_url: str
) -> None:
    made = make_key(redis_url)
    assert ask(gateway, made["secret"]).status_code == 200
    mixfleet(redis_url, "key", "revoke", made["key_id"])
    until(lambda: ask(gateway, made["secret"]).status_code == 401, "it is refused", 2.0)


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_loopback_is_open_until_the_first_key_is_made(redis_url: str, tmp_path: Path) -> None:
    with GatewayProcess(redis_url, tmp_path) as gateway:
        assert ask(gateway).status_code == 200
        secret = make_key(redis_url)["secret"]
        until(lambda: ask(gateway).status_code == 401, "a key is asked for", 3.0)
        assert ask(gateway, secret).status_code == 200


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_a_gateway_that_others_reach_does_not_start_without_a_key(
    listen: str, redis: Redis, redis_url: str
) -> None:
    assert redis.dbsize() == 0
    refused = mixfleet(redis_url, "gateway", "--listen", listen)
    assert refused.returncode != 0
    assert f"listen={listen}: others can reach it" in refused.stderr
    assert "mixfleet key create --name NAME" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_web_pages_of_other_hosts_are_refused_by_an_open_gateway(
    redis_url: str, tmp_path: Path
) -> None:
    with GatewayProcess(redis_url, tmp_path) as gateway:
        for headers in (
            {"host": "evil.example"},
            {"host": f"127.0.0.1.evil.example:{gateway.port}"},
            {"host": ""},
            {"sec-fetch-site": "cross-site", "origin": "https://evil.example"},
        ):
            refused = error_of(ask(gateway, headers=headers), 403)
            assert refused["code"] == "host_not_allowed"
        for headers in (
            {"host": f"localhost:{gateway.port}"},
            {"host": f"[::1]:{gateway.port}"},
            {"sec-fetch-site": "same-origin"},
        ):
            answer = ask(gateway, headers=headers)
            assert answer.status_code == 200
            assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_web_pages_of_named_origins_may_ask(redis_url: str, tmp_path: Path) -> None:
    friend = {"origin": "https://friend.example", "sec-fetch-site": "cross-site"}
    options = ("--cors-origins", "https://friend.example")
    with GatewayProcess(redis_url, tmp_path, *options) as gateway, gateway.client() as client:
        preflight = client.options(
            CHAT, headers={**friend, "access-control-request-method": "POST"}
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://friend.example"
        answer = ask(gateway, headers=friend)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        assert "x-job-id" in answer.headers["access-control-expose-headers"]
        other = {**friend, "origin": "https://other.example"}
        assert error_of(ask(gateway, headers=other), 403)["code"] == "host_not_allowed"
