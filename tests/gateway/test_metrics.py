"""`GET /metrics` of a real gateway."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from mixfleet_broker.api_keys import ApiKeys
from mixfleet_broker.gateway.metric_names import METRICS
from mixfleet_broker.key_records import KeyTerms, Limits
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("redis")]

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def gateway(redis_url: str, tmp_path: Path) -> Iterator[GatewayProcess]:
    with (
        EchoWorker(redis_url),
        GatewayProcess(redis_url, tmp_path, "--vllm-metric-aliases", "on") as running,
    ):
        yield running


def chat(gateway: GatewayProcess) -> None:
    answer = requests.post(f"{gateway.url}/v1/chat/completions", json=CHAT, timeout=30)
    assert answer.json()["choices"][0]["message"]["content"] == "hello", answer.text


def page(gateway: GatewayProcess) -> str:
    answer = requests.get(f"{gateway.url}/metrics", timeout=10)
    assert answer.headers["content-type"].startswith("text/plain")
    answer.raise_for_status()
    return answer.text


def values(text: str) -> dict[tuple[str, ...], float]:
    """By the sample's name and its labels' values, which come in the order of the labels' names."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_served_chat_is_counted_and_timed(gateway: GatewayProcess) -> None:
    chat(gateway)
    found = values(page(gateway))
    assert found["mixfleet_jobs_total", "tiny", "stop", "finished"] == 1
    assert found["mixfleet_generation_tokens_total", "tiny"] == 5
    assert found["mixfleet_prompt_tokens_total", "tiny"] == 1
    assert found["mixfleet_time_to_first_token_seconds_count", "tiny"] == 1
    assert found["mixfleet_inter_token_latency_seconds_count", "tiny"] == 4
    assert found["mixfleet_e2e_request_latency_seconds_count", "tiny"] == 1
    assert found["mixfleet_request_queue_time_seconds_count", "tiny"] == 1
    assert found["mixfleet_workers", "tiny", "idle"] == 1
    assert found["mixfleet_queue_depth", "tiny"] == 0
    assert found[("mixfleet_gateway_jobs_open",)] == 0
    assert found[("mixfleet_redis_up",)] == 1


def test_vllms_names_give_the_same_numbers(gateway: GatewayProcess) -> None:
    chat(gateway)
    found = values(page(gateway))
    assert found["vllm:num_requests_waiting", "0", "tiny"] == 0
    assert found["vllm:num_requests_running", "0", "tiny"] == 0
    assert found["vllm:request_success_total", "0", "stop", "tiny"] == 1
    assert found["vllm:generation_tokens_total", "0", "tiny"] == 5
    for suffix in ("_sum", "_count"):
        name = "time_to_first_token_seconds" + suffix
        assert found[f"vllm:{name}", "0", "tiny"] == found[f"mixfleet_{name}", "tiny"]


def test_every_metric_is_in_the_table_and_every_one_of_the_table_is_there(
    gateway: GatewayProcess,
) -> None:
    chat(gateway)
    found = {
        family.name: family.type
        for family in text_string_to_metric_families(page(gateway))
        if not family.name.startswith("process_")
    }
    expected = {spec.name.removesuffix("_total"): spec.kind for spec in METRICS}
    expected |= {
        spec.vllm_name.removesuffix("_total"): spec.kind for spec in METRICS if spec.vllm_name
    }
    assert found == expected


def test_promtool_has_nothing_to_say(redis_url: str, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH")
    with EchoWorker(redis_url), GatewayProcess(redis_url, tmp_path) as gateway:
        chat(gateway)
        checked = subprocess.run(
            [promtool, "check", "metrics"],
            input=page(gateway),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_key_needs_the_scope_ops(redis_url: str, redis: Redis, tmp_path: Path) -> None:
    keys = ApiKeys(redis)
    _, chats = keys.create(KeyTerms(name="chats"))
    _, scrapes = keys.create(KeyTerms(name="scrapes", scopes=frozenset({"ops"})))
    with GatewayProcess(redis_url, tmp_path) as gateway:
        statuses = [
            requests.get(f"{gateway.url}/metrics", headers=headers, timeout=10).status_code
            for headers in ({}, {"x-api-key": chats}, {"x-api-key": scrapes})
        ]
    assert statuses == [401, 403, 200]


def test_a_request_that_a_limit_stops_is_counted_by_its_code(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    terms = KeyTerms(
        name="one", scopes=frozenset({"chat", "ops"}), limits=Limits(requests_per_min=1)
    )
    _, secret = ApiKeys(redis).create(terms)
    headers = {"x-api-key": secret}
    with EchoWorker(redis_url), GatewayProcess(redis_url, tmp_path) as gateway:
        chats = [
            requests.post(
                f"{gateway.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=9
            )
            for _ in range(2)
        ]
        assert [answer.status_code for answer in chats] == [200, 429]
        text = requests.get(f"{gateway.url}/metrics", headers=headers, timeout=9).text
    code = chats[1].json()["error"]["code"]
    assert values(text)["mixfleet_jobs_refused_total", code, "tiny"] == 1
