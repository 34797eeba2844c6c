"""Keys and sessions of AIME's clients."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.aime_client import AimeError
from support.aime_gateway import client, refused, send
from support.aime_gateway import gateway as gateway
from support.aime_gateway import worker as worker
from support.gateway import GatewayProcess
from support.key_command import make_key
from support.queue_jobs import MODEL
from support.worker_process import until


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
    stranger = client(gateway, bound)
    assert refused(403, stranger.login)["code"] == "model_not_allowed"
    assert refused(403, stranger.submit, prompt_input="x")["code"] == "model_not_allowed"
    assert aime.get("/api/validate_key", key=secret) == {"success": True, "error": None}
    refused(401, aime.get, "/api/validate_key", key="nonsense")
    # AIME's JavaScript client hands `false`, which should have made it a GET, over as the body.
    for body in (b"false", b"null"):
        good = send("POST", gateway, f"/api/validate_key?key={secret}", data=body)
        assert (good.status_code, good.json()) == (200, {"success": True, "error": None})
        bad = send("POST", gateway, "/api/validate_key?key=nonsense", data=body)
        assert (bad.status_code, bad.json()["code"]) == (401, "invalid_api_key")
    none = send("POST", gateway, f"/api/validate_key?key={secret}", data=b"[]")
    assert (none.status_code, none.json()["code"]) == (400, "invalid_json")
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
def test_a_polled_job_gives_back_what_it_did_not_use(
    gateway: GatewayProcess, redis_url: str
) -> None:
    """Though nobody polls it: its gateway hears it to its end."""
    made = make_key(redis_url, "--tpd", "5000")

    def remaining() -> int:
        command = [sys.executable, "-m", "mixfleet", "key", "show", made["key_id"], "--json"]
        shown = subprocess.run(
            [*command, "--redis", redis_url], capture_output=True, check=True, timeout=60
        )
        [state] = json.loads(shown.stdout)["used"]
        number: int = state["remaining"]
        return number

    client(gateway, made["secret"]).submit(prompt_input="hello", max_gen_tokens=4000)
    until(lambda: remaining() == 4995, "only the five tokens of the answer are charged")


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_who_shows_no_key_is_not_told_the_names_of_workers(
    gateway: GatewayProcess, redis_url: str
) -> None:
    secret = make_key(redis_url)["secret"]
    aime = client(gateway)
    until(
        lambda: aime.get(f"/api/{MODEL}")["workers"][0]["name"] == "worker-1",
        "the gateway knows that there are keys",
    )
    assert aime.get(f"/api/{MODEL}", key=secret)["workers"][0]["name"] == "echo"
