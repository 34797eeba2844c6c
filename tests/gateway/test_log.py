"""What a gateway and a worker log of a chat."""

import json
from pathlib import Path
from typing import Any

import pytest
import requests

from support.gateway import GatewayProcess
from support.worker_process import WorkerProcess, until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("redis")]

PROMPT = "xylophone"
SIMULATED = ("--simulated", "--simulated-step-s", "0", "--model", "tiny")


def chat(gateway: GatewayProcess) -> str:
    body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": PROMPT}]}
    answer = requests.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=30)
    answer.raise_for_status()
    return answer.headers["x-job-id"]


def lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines()]


def of_job(log: str, event: str, job_id: str) -> dict[str, Any]:
    (found,) = [x for x in lines(log) if x["event"] == event and x.get("job_id") == job_id]
    return found


def test_json_lines_say_of_a_chat_all_but_what_was_said(redis_url: str, tmp_path: Path) -> None:
    worker = WorkerProcess(redis_url, "w1", tmp_path, *SIMULATED, "--log-json", "on")
    with worker, GatewayProcess(redis_url, tmp_path, "--log-json", "on") as gateway:
        job_id = chat(gateway)
        until(lambda: "job ended" in worker.log, "the worker has logged the end")
        served = of_job(gateway.log, "job_served", job_id)
        ended = of_job(worker.log, "job ended", job_id)
        assert (served["model"], served["state"], served["tokens"]) == ("tiny", "finished", 5)
        assert served["total_ms"] >= served["ttft_ms"] >= 0
        assert served["worker_id"] == ended["worker_id"] == "w1"
        assert ended["tokens"] == 5
        assert PROMPT not in gateway.log + worker.log


def test_plain_lines_hold_no_prompt_either(redis_url: str, tmp_path: Path) -> None:
    worker = WorkerProcess(redis_url, "w1", tmp_path, *SIMULATED)
    with worker, GatewayProcess(redis_url, tmp_path) as gateway:
        job_id = chat(gateway)
        until(lambda: "job ended" in worker.log, "the worker has logged the end")
        assert f"job_served job_id={job_id}" in gateway.log
        assert PROMPT not in gateway.log + worker.log
