"""AIME's interface, spoken to as AIME's own clients speak, over real gateways and queues."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from redis import Redis

from mixfleet_broker.jobs import find_job
from mixfleet_broker.keys import CHANNEL
from mixfleet_broker.messages import JobEnd
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord
from support.aime_client import AimeClient, AimeError
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.queue_jobs import MODEL, claim_one
from support.worker_process import until

CONTEXT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
]
NODE = shutil.which("node")


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    with GatewayProcess(redis_url, tmp_path) as process:
        yield process


@pytest.fixture
def worker(redis_url: str) -> Iterator[EchoWorker]:
    with EchoWorker(redis_url) as echo:
        yield echo


@pytest.fixture
def held(redis_url: str) -> Iterator[EchoWorker]:
    """A worker that says three tokens and waits to be let go."""
    with EchoWorker(redis_url, hold_after=3) as echo:
        yield echo


@pytest.fixture
def registered(redis: Redis) -> Iterator[JobQueue]:
    """A queue whose worker is known and claims nothing: the test does that."""
    record = WorkerRecord.of_this_process(
        worker_id="w1", model=MODEL, max_batch_size=1, context_length=8192, started_at=0.0
    )
    registration = Registration(redis, record, lease_s=15.0)
    registration.beat(state="idle", in_flight=0)
    yield JobQueue(redis, MODEL)
    registration.deregister()


def client(gateway: GatewayProcess, key: str | None = None) -> AimeClient:
    return AimeClient(gateway.url, MODEL, key)


def send(
    method: str, gateway: GatewayProcess, path: str, timeout: float = 20.0, **body: Any
) -> requests.Response:
    """Ask for something that AIME's clients never ask for."""
    with requests.Session() as session:
        session.trust_env = False
        return session.request(method, gateway.url + path, timeout=timeout, **body)


def refused(status: int, call: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The body of an error, which must have AIME's form."""
    with pytest.raises(AimeError) as caught:
        call(*args, **kwargs)
    body = caught.value.body
    assert caught.value.status == status, body
    assert body["success"] is False
    assert isinstance(body["error"], str)
    return body


def make_key(url: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "mixfleet", "key", "create", "--name", "test", "--json"]
    made = subprocess.run(
        [*command, "--redis", url, *options], capture_output=True, text=True, check=True, timeout=60
    )
    record: dict[str, Any] = json.loads(made.stdout)
    return record


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_blocking_call_gives_the_whole_result(gateway: GatewayProcess) -> None:
    result = client(gateway).request(
        prompt_input="hello", chat_context=json.dumps(CONTEXT), temperature=0, max_gen_tokens=50
    )
    assert result["success"] is True
    assert result["ep_version"] == 1
    assert result["text"] == "hello"
    assert result["num_generated_tokens"] == 5
    # The echo counts one prompt token a turn: three of the context, and the question.
    assert result["prompt_length"] == 4
    assert result["current_context_length"] == 9
    assert (result["model_name"], result["max_seq_len"]) == (MODEL, 8192)
    assert (result["auth"], result["worker"], result["finish_reason"]) == ("echo", "echo", "stop")
    times = [result[n] for n in ("start_time", "start_time_compute", "finished_time")]
    assert times == sorted(times)
    durations = ("pending_duration", "compute_duration", "total_duration", "ttft_s", "queue_s")
    assert all(result[name] >= 0 for name in durations)
    assert result["total_duration"] == pytest.approx(
        result["pending_duration"] + result["compute_duration"], abs=0.01
    )
    assert result["tokens_per_s"] == pytest.approx(5 / result["compute_duration"])
    assert "auth_key" not in json.dumps(result)


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_without_a_context_the_prompt_is_plain_text(gateway: GatewayProcess) -> None:
    result = client(gateway).request(prompt_input="Once upon", chat_context="", top_k=1, top_p=1)
    assert result["text"] == "Once upon"
    assert result["prompt_length"] == 0  # the echo counts turns, and there is none


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_the_context_may_be_a_list_and_hold_the_question(gateway: GatewayProcess) -> None:
    asked = [*CONTEXT, {"role": "user", "content": [{"type": "text", "text": "three"}]}]
    assert client(gateway).request(chat_context=asked)["text"] == "three"


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_everything_can_be_asked_by_get(gateway: GatewayProcess) -> None:
    query = {"prompt_input": "hi", "top_k": 1, "top_p": 0.5, "temperature": 0.0}
    aime = client(gateway)
    assert aime.get(f"/{MODEL}", **query)["text"] == "hi"
    job_id = aime.get(f"/{MODEL}", **query, wait_for_result=False)["job_id"]
    until(lambda: aime.poll(job_id)["job_state"] == "done", "the job is done")
    assert refused(400, aime.get, f"/{MODEL}", prompt_input="hi", top_k="many")["error"] == (
        "top_k: is 'many', must be a whole number"
    )


@pytest.mark.slow
def test_a_polled_job_shows_its_text_and_its_result_again_and_again(
    gateway: GatewayProcess, held: EchoWorker
) -> None:
    aime = client(gateway)
    job_id = aime.submit(prompt_input="hello")
    assert len(job_id) == 32
    waiting = aime.submit(prompt_input="next")

    until(lambda: aime.poll(job_id)["progress"]["progress"] == 3, "three tokens came")
    assert aime.poll(job_id) == {
        "success": True,
        "job_id": job_id,
        "ep_version": 1,
        "job_state": "processing",
        "progress": {
            "queue_position": 0,
            "estimate": 0,
            "num_workers_online": 1,
            "progress": 3,
            "progress_data": {
                "text": "hel",
                "num_generated_tokens": 3,
                "current_context_length": 3,
            },
        },
    }
    queued = aime.poll(waiting)
    assert queued["job_state"] == "queued"
    assert queued["progress"]["queue_position"] == 0
    assert queued["progress"]["progress_data"]["text"] == ""

    held.go.set()
    until(lambda: aime.poll(job_id)["job_state"] == "done", "the job is done")
    first, second = aime.poll(job_id), aime.poll(job_id)
    assert first == second
    assert set(first) == {"success", "job_id", "ep_version", "job_state", "job_result"}
    assert first["job_result"]["text"] == "hello"


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_any_gateway_tells_of_a_job(
    gateway: GatewayProcess, redis_url: str, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    job_id = client(gateway).submit(prompt_input="hello")
    with GatewayProcess(redis_url, tmp_path / "other") as other:
        until(lambda: client(other).poll(job_id)["job_state"] == "done", "the job is done")
        assert client(other).poll(job_id)["job_result"]["text"] == "hello"


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_the_generator_goes_from_started_to_done(gateway: GatewayProcess) -> None:
    items = list(client(gateway).generate(prompt_input="hello", max_gen_tokens=20))
    assert items[0]["job_state"] == "started"
    assert items[-1]["job_state"] == "done"
    assert items[-1]["result_data"]["text"] == "hello"
    texts = [item["progress_data"]["text"] for item in items[1:-1]]
    assert texts == sorted(texts)


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
def test_zero_means_zero(gateway: GatewayProcess, redis: Redis) -> None:
    """A temperature or a nucleus of 0 takes the most likely token, and is not a default."""
    result = client(gateway).request(prompt_input="hi", temperature=0, top_p=0)
    assert result["text"] == "hi"
    assert find_job(redis, result["job_id"]).state == "finished"


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
def test_a_client_that_goes_away_cancels_its_blocking_call(
    gateway: GatewayProcess, redis: Redis, held: EchoWorker
) -> None:
    with pytest.raises(requests.Timeout):
        send("POST", gateway, f"/{MODEL}", json={"prompt_input": "hello"}, timeout=1.0)
    until(lambda: len(held.lost) == 1, "the worker lost the job")
    assert find_job(redis, held.lost[0]).state == "canceled"


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
def test_the_key_is_asked_for_everywhere_and_jobs_are_their_owners(
    gateway: GatewayProcess, redis_url: str
) -> None:
    secret, other = make_key(redis_url)["secret"], make_key(redis_url)["secret"]
    aime = client(gateway, secret)

    def asks_for_a_key() -> bool:
        return send("GET", gateway, "/v1/models").status_code == 401

    until(asks_for_a_key, "the gateway asks for keys")
    job_id = aime.submit(prompt_input="hello")
    until(lambda: aime.poll(job_id)["job_state"] == "done", "the job is done")
    assert aime.request(prompt_input="hello")["text"] == "hello"
    assert refused(401, client(gateway).request, prompt_input="x")["code"] == "missing_api_key"
    assert refused(401, client(gateway).poll, job_id)["ep_version"] == 1
    wrong = client(gateway, "mf-" + "x" * 43)
    for call in (wrong.login, lambda: wrong.poll(job_id), lambda: wrong.request(prompt_input="x")):
        assert refused(401, call)["code"] == "invalid_api_key"
    assert refused(404, client(gateway, other).poll, job_id)["code"] == "unknown_job"
    bound = make_key(redis_url, "--model", "other")["secret"]
    for call in (
        client(gateway, bound).login,
        lambda: client(gateway, bound).submit(prompt_input="x"),
    ):
        assert refused(403, call)["code"] == "model_not_allowed"
    assert aime.get("/api/validate_key", key=secret) == {"success": True, "error": None}
    refused(401, aime.get, "/api/validate_key", key="nonsense")
    assert aime.get("/api/endpoints", key=bound)["endpoints"] == []
    assert aime.get("/api/endpoints", key=secret)["endpoints"] == [MODEL]


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_sessions_key_opens_all_gateways_until_its_key_is_revoked(
    redis_url: str, tmp_path: Path
) -> None:
    made = make_key(redis_url)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        GatewayProcess(redis_url, tmp_path / "a") as one,
        GatewayProcess(redis_url, tmp_path / "b") as two,
    ):
        aime, elsewhere = client(one, made["secret"]), client(two)
        session = aime.login()
        assert session != made["secret"]
        elsewhere.session_key = session
        job_id = aime.submit(prompt_input="hello")
        until(lambda: elsewhere.poll(job_id)["job_state"] == "done", "the job is done")
        assert elsewhere.request(prompt_input="again")["text"] == "again"
        elsewhere.session_key = "mf-" + "y" * 43
        assert refused(401, elsewhere.poll, job_id)["code"] == "invalid_api_key"
        command = [sys.executable, "-m", "mixfleet", "key", "revoke", made["key_id"]]
        subprocess.run([*command, "--redis", redis_url], check=True, timeout=60)

        def is_over() -> bool:
            try:
                aime.poll(job_id)
            except AimeError as error:
                return error.status == 401
            return False

        until(is_over, "the session is over")
        assert session not in one.log + two.log
        assert made["secret"] not in one.log + two.log


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_on_a_gateway_without_keys_a_login_is_enough_of_a_key(gateway: GatewayProcess) -> None:
    aime = client(gateway)
    aime.login()
    assert aime.request(prompt_input="hello")["text"] == "hello"


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_endpoints_tell_what_they_take_at_the_new_and_the_older_path(
    gateway: GatewayProcess,
) -> None:
    aime = client(gateway)
    details = aime.get(f"/api/endpoints/{MODEL}")
    assert details == aime.get(f"/api/{MODEL}")
    assert (details["num_workers"], details["num_active_workers"]) == (1, 1)
    assert details["workers"][0]["name"] == "echo"
    assert details["parameter_description"]["input"]["top_k"] == {
        "type": "integer",
        "required": False,
        "minimum": 1,
        "maximum": 1000,
        "default": 40,
    }


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
