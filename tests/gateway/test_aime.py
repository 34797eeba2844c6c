"""AIME's interface, spoken to as AIME's own clients speak, over real gateways and queues."""

import json
from pathlib import Path

import pytest
import requests
from redis import Redis

from mixfleet_broker.job_codec import decode_job
from mixfleet_broker.jobs import find_job
from mixfleet_broker.messages import SamplingSettings
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord
from support.aime_client import AimeClient
from support.aime_gateway import client, refused, send
from support.aime_gateway import gateway as gateway
from support.aime_gateway import held as held
from support.aime_gateway import registered as registered
from support.aime_gateway import worker as worker
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.queue_jobs import MODEL, claim_one
from support.worker_process import until

ROOT = Path(__file__).parents[2]
CONTEXT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
]


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
    order = ("start_time", "start_time_compute", "arrival_time", "finished_time")
    times = [result[n] for n in (*order, "result_sent_time", "result_received_time")]
    assert times == sorted(times)
    # What AIME's benchmark takes for the time of writing: none of it is spent in the queue.
    in_worker = result["finished_time"] - result["arrival_time"] - result["pending_duration"]
    assert in_worker == pytest.approx(result["compute_duration"])
    durations = ("compute_duration", "total_duration", "ttft_s", "queue_s")
    assert all(result[name] >= 0 for name in durations)
    assert result["total_duration"] == pytest.approx(
        result["queue_s"] + result["compute_duration"], abs=0.01
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
    # 0 is AIME's word for a job that is worked on, and starts the clocks of its benchmark.
    assert queued["progress"]["queue_position"] == 1
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
def test_zero_means_zero(gateway: GatewayProcess, redis: Redis) -> None:
    """A temperature or a nucleus of 0 takes the most likely token, and is not a default."""
    result = client(gateway).request(prompt_input="hi", temperature=0, top_p=0)
    assert result["text"] == "hi"
    assert find_job(redis, result["job_id"]).state == "finished"


@pytest.mark.slow
def test_a_client_that_goes_away_cancels_its_blocking_call(
    gateway: GatewayProcess, redis: Redis, held: EchoWorker
) -> None:
    with pytest.raises(requests.Timeout):
        send("POST", gateway, f"/{MODEL}", json={"prompt_input": "hello"}, timeout=1.0)
    until(lambda: len(held.lost) == 1, "the worker lost the job")
    assert find_job(redis, held.lost[0]).state == "canceled"


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
def test_a_job_carries_what_was_asked_and_aimes_defaults_for_the_rest(
    gateway: GatewayProcess, registered: JobQueue
) -> None:
    aime = client(gateway)
    aime.submit(prompt_input="three", chat_context=json.dumps(CONTEXT))
    job = decode_job(claim_one(registered).payload)
    turns = [(turn["role"], turn["content"]) for turn in CONTEXT] + [("user", "three")]
    assert [(turn.role, turn.content) for turn in job.messages] == turns
    assert job.sampling == SamplingSettings(temperature=0.8, top_k=40, top_p=0.9, max_tokens=2000)
    aime.submit(prompt_input="x", temperature=0, top_k=7, top_p=0, max_gen_tokens=3)
    job = decode_job(claim_one(registered).payload)
    assert (job.messages, job.prompt) == ((), "x")
    assert job.sampling == SamplingSettings(temperature=0, top_k=1, max_tokens=3)


@pytest.mark.slow
@pytest.mark.usefixtures("worker")
def test_a_file_says_what_an_endpoint_takes(redis_url: str, tmp_path: Path) -> None:
    example = (ROOT / "deploy/aime_endpoints/mixtral_chat.cfg").read_text()
    folder = tmp_path / "endpoints" / "chat"
    folder.mkdir(parents=True)
    text = example.replace('job_type = "mixtral"', f'job_type = "{MODEL}"')
    (folder / "aime_api_endpoint.cfg").write_text(text.replace("maximum = 1000", "maximum = 50"))
    options = ("--aime-endpoints", str(tmp_path / "endpoints"))
    with GatewayProcess(redis_url, tmp_path, *options) as gateway:
        aime = AimeClient(gateway.url, "mixtral_chat")
        result = aime.request(prompt_input="hello", top_k=50)
        assert (result["text"], result["ep_version"]) == ("hello", 2)
        assert result["worker"] == "echo"
        body = refused(400, aime.request, prompt_input="hello", top_k=51)
        assert (body["error"], body["ep_version"]) == ("top_k: is 51, must be at most 50", 2)
        assert aime.get("/api/endpoints")["endpoints"] == ["mixtral_chat"]
        assert aime.get("/api/mixtral_chat")["title"] == "Mixtral Chat"
        assert send("GET", gateway, f"/{MODEL}").status_code == 404


@pytest.mark.slow
def test_in_a_small_model_the_default_length_leaves_half_of_the_context_to_the_prompt(
    gateway: GatewayProcess, redis: Redis
) -> None:
    record = WorkerRecord.of_this_process(
        worker_id="small", model=MODEL, max_batch_size=1, context_length=1000, started_at=0.0
    )
    Registration(redis, record, lease_s=15.0).beat(state="idle", in_flight=0)
    queue = JobQueue(redis, MODEL)
    client(gateway).submit(prompt_input="x")
    assert decode_job(claim_one(queue).payload).sampling.max_tokens == 500
    client(gateway).submit(prompt_input="x", max_gen_tokens=600)
    assert decode_job(claim_one(queue).payload).sampling.max_tokens == 600
