"""Anthropic's messages through a real gateway, read by Anthropic's own client as it is."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import Anthropic, AsyncAnthropic

from mixfleet_broker.messages import AnswerPart, ChatMessage, SamplingSettings
from mixfleet_broker.tool_call_text import tool_call_id
from support.answer_worker import NUM_PROMPT_TOKENS, AnswerWorker, Scripted
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.redis_server import RedisServer
from support.tiny_model import tiny_config, write_hf_checkpoint
from support.tokenizer_files import write_byte_level_json
from support.worker_process import WorkerProcess, until

MODEL = "tiny"
GOLDEN = Path(__file__).parent / "golden" / "anthropic_stream.json"
QUESTION: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
TOOL: Any = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    "cache_control": {"type": "ephemeral"},
}
# Not among the arguments of this client any more, but of older ones and of other people's.
SAMPLING = {"temperature": 0, "top_p": 0.5, "top_k": 5}
HELLO = Scripted((("text", "Hel"), ("text", "lo"), ("text", " 🙂")))
CALL: tuple[tuple[AnswerPart, str], ...] = (
    ("text", "Let me see."),
    ("tool_calls", '[{"name": "weather", "arg'),
    ("tool_calls", 'uments": {"city": "Pa'),
    ("tool_calls", 'ris"}}]'),
)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def shared_worker(server: RedisServer) -> Iterator[AnswerWorker]:
    with AnswerWorker(server.url, MODEL) as worker:
        yield worker


@pytest.fixture
def worker(shared_worker: AnswerWorker) -> AnswerWorker:
    shared_worker.script.clear()
    shared_worker.jobs.clear()
    return shared_worker


@pytest.fixture(scope="module")
def url(
    server: RedisServer, shared_worker: AnswerWorker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    del shared_worker  # its model is known before the gateway looks
    directory = tmp_path_factory.mktemp("gateway")
    with GatewayProcess(server.url, directory, "--keep-alive-s", "0.1") as gateway:
        yield gateway.url


@pytest.fixture
def client(url: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=url, api_key="none is needed", max_retries=0) as client:
        yield client


def ask(client: Anthropic, **more: Any) -> anthropic.types.Message:
    message = client.messages.create(
        **{"model": MODEL, "max_tokens": 50, "messages": QUESTION, **more}
    )
    assert isinstance(message, anthropic.types.Message)
    return message


def streamed(client: Anthropic, **asked: Any) -> anthropic.types.Message:
    with client.messages.stream(**asked) as stream:
        return stream.get_final_message()


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_whole_answer_has_text_reason_and_usage(client: Anthropic, worker: AnswerWorker) -> None:
    worker.script.append(HELLO)
    message = ask(client, system="Be brief.", metadata={"user_id": "u"}, extra_body=SAMPLING)
    assert text_of(message) == "Hello 🙂"
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (NUM_PROMPT_TOKENS, 3)
    (job,) = worker.jobs
    assert message.id == f"msg_{job.job_id}"
    assert message._request_id is not None
    assert message._request_id.startswith("req_")
    assert job.messages == (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Weather in Paris?"),
    )
    assert job.sampling == SamplingSettings(temperature=0.0, top_p=0.5, top_k=5, max_tokens=50)


def test_system_and_turns_may_be_blocks_with_marks_for_a_cache(
    client: Anthropic, worker: AnswerWorker
) -> None:
    worker.script.append(HELLO)
    mark = {"type": "ephemeral", "ttl": "1h"}
    ask(
        client,
        system=[{"type": "text", "text": "Be ", "cache_control": mark}, text_block("brief.")],
        messages=[
            {"role": "user", "content": [text_block("a"), text_block("b")]},
            {"role": "assistant", "content": "It begins"},
        ],
        extra_headers={"anthropic-beta": "prompt-caching-2024-07-31"},
    )
    assert [(m.role, m.content) for m in worker.jobs[0].messages] == [
        ("system", "Be brief."),
        ("user", "ab"),
        ("assistant", "It begins"),
    ]


def text_block(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_a_stream_has_the_text_as_it_comes_and_the_same_message_at_its_end(
    client: Anthropic, worker: AnswerWorker
) -> None:
    worker.script += [HELLO, HELLO]
    with client.messages.stream(model=MODEL, max_tokens=50, messages=QUESTION) as stream:
        assert list(stream.text_stream) == ["Hel", "lo", " 🙂"]
        streamed = stream.get_final_message()
    # The helper adds a field of its own.
    own = {"id": "", "stop_details": None}
    assert streamed.to_dict() | own == ask(client).to_dict() | own


async def _answers_of_the_async_client(url: str) -> tuple[str, list[str]]:
    async with AsyncAnthropic(base_url=url, api_key="none is needed", max_retries=0) as client:
        whole = await client.messages.create(model=MODEL, max_tokens=50, messages=QUESTION)
        async with client.messages.stream(model=MODEL, max_tokens=50, messages=QUESTION) as stream:
            return text_of(whole), [text async for text in stream.text_stream]


def test_the_async_client_reads_the_same(url: str, worker: AnswerWorker) -> None:
    worker.script += [HELLO, HELLO]
    assert asyncio.run(_answers_of_the_async_client(url)) == ("Hello 🙂", ["Hel", "lo", " 🙂"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("scripted", "reasons"),
    [
        (Scripted((("text", "a"),), stop_string="END"), ("stop_sequence", "END")),
        (Scripted((("text", "a"),), finish_reason="length"), ("max_tokens", None)),
        (Scripted((("text", ""),)), ("end_turn", None)),
        (Scripted(()), ("end_turn", None)),
        (Scripted(CALL), ("tool_use", None)),
        (Scripted(CALL[:3], finish_reason="length"), ("max_tokens", None)),
    ],
)
def test_the_reason_of_the_end_is_told(
    client: Anthropic,
    worker: AnswerWorker,
    scripted: Scripted,
    reasons: tuple[str, str | None],
    *,
    stream: bool,
) -> None:
    worker.script.append(scripted)
    asked: Any = {"model": MODEL, "max_tokens": 50, "messages": QUESTION, "tools": [TOOL]}
    asked["stop_sequences"] = ["END", "\n\n"]
    message = streamed(client, **asked) if stream else ask(client, **asked)
    assert (message.stop_reason, message.stop_sequence) == reasons
    assert message.usage.output_tokens == len(scripted.pieces)
    assert worker.jobs[0].sampling.stop == ("END", "\n\n")


def test_a_call_and_its_result_go_there_and_back(client: Anthropic, worker: AnswerWorker) -> None:
    worker.script += [Scripted(CALL), HELLO]
    first = ask(client, tools=[TOOL])
    call = first.content[1]
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("weather", {"city": "Paris"})
    assert call.id == tool_call_id(worker.jobs[0].job_id, 0)
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": call.id, "is_error": False}
    result["content"] = [text_block("12 °C")]
    turns: list[Any] = [
        *QUESTION,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [text_block("Here:"), result, text_block("And tomorrow?")]},
    ]
    assert text_of(ask(client, tools=[TOOL], messages=turns)) == "Hello 🙂"
    asked = worker.jobs[1]
    assert [(m.role, m.content, m.call_id) for m in asked.messages[1:]] == [
        ("assistant", "Let me see.", None),
        ("user", "Here:", None),
        ("tool", "12 °C", call.id),
        ("user", "And tomorrow?", None),
    ]
    (wire_call,) = asked.messages[1].tool_calls
    assert (wire_call.call_id, json.loads(wire_call.arguments)) == (call.id, {"city": "Paris"})
    (tool,) = asked.tools
    assert (tool.name, json.loads(tool.parameters)) == ("weather", TOOL["input_schema"])


@pytest.mark.parametrize(
    ("choice", "written"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "weather"}, "=weather"),
    ],
)
def test_each_choice_of_tools_reaches_the_worker(
    client: Anthropic, worker: AnswerWorker, choice: dict[str, str], written: str
) -> None:
    worker.script.append(HELLO)
    ask(client, tools=[TOOL], tool_choice=choice)
    assert worker.jobs[0].tool_choice == written


def test_the_helper_reads_a_call_piece_by_piece(client: Anthropic, worker: AnswerWorker) -> None:
    worker.script.append(Scripted(CALL))
    with client.messages.stream(
        model=MODEL, max_tokens=50, messages=QUESTION, tools=[TOOL]
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    assert pieces == ['{"city": "Pa', 'ris"}']
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.content[1].to_dict()["input"] == {"city": "Paris"}


def test_what_models_write_beyond_json_is_still_an_answer(
    client: Anthropic, worker: AnswerWorker
) -> None:
    text = '[{"name": "weather", "arguments": {"city": NaN, "half": "\\ud83d"}}]'
    worker.script.append(Scripted((("tool_calls", text),)))
    (call,) = ask(client, tools=[TOOL]).content
    assert call.type == "tool_use"
    assert call.input == {"city": "NaN", "half": "\ud83d"}


def test_the_events_of_a_stream_are_those_of_the_golden_file(
    url: str, worker: AnswerWorker
) -> None:
    worker.script.append(Scripted((*CALL, ("text", "Done."))))
    body = {"model": MODEL, "max_tokens": 50, "messages": QUESTION, "tools": [TOOL]}
    response = httpx2.post(f"{url}/v1/messages", json={**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["request-id"] == response.headers["x-request-id"]
    job_id = worker.jobs[0].job_id
    text = response.text.replace(job_id, "JOB").replace(tool_call_id(job_id, 0), "CALL")
    assert events_of(text) == json.loads(GOLDEN.read_text())


def events_of(text: str) -> list[Any]:
    """The data of all events but pings; each is named as its data says."""
    found = []
    for event in text.strip().split("\n\n"):
        if event.startswith((":", "event: ping")):
            continue
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_an_error_in_the_middle_is_an_event_and_an_error_of_the_client(
    client: Anthropic, worker: AnswerWorker
) -> None:
    with client.messages.stream(model=MODEL, max_tokens=50, messages=QUESTION) as stream:
        worker.script.append(Scripted((("text", "a"),), code="engine_failed"))
        with pytest.raises(anthropic.APIStatusError, match="as scripted") as caught:
            list(stream.text_stream)
    error = caught.value
    assert isinstance(error.body, dict)
    assert error.body["type"] == "error"
    assert error.body["error"]["type"] == "api_error"
    assert error.body["request_id"] == error.request_id


@pytest.mark.slow  # a second passes before the first look
def test_a_stream_tells_while_it_waits_where_its_job_stands(url: str, worker: AnswerWorker) -> None:
    body = {"model": MODEL, "max_tokens": 50, "messages": QUESTION, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/messages", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(": ")
        worker.script.append(HELLO)
        assert "event: message_stop" in list(lines)


@pytest.fixture
def held(server: RedisServer, url: str) -> Iterator[EchoWorker]:
    """Stops after two letters of the question, with a model of its own."""
    with EchoWorker(server.url, "held", worker_id="held", hold_after=2) as held:
        until(lambda: httpx2.get(f"{url}/v1/models/held").status_code == 200, "it is known")
        yield held


def test_a_stream_that_has_nothing_to_say_is_kept_alive_by_pings(
    url: str, held: EchoWorker
) -> None:
    body = {"model": "held", "max_tokens": 50, "messages": QUESTION, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/messages", json=body) as response:
        lines = response.iter_lines()
        assert "event: message_start" in lines
        assert "event: ping" in lines
        assert next(lines) == 'data: {"type":"ping"}'
        held.go.set()
        assert "event: message_stop" in lines


def test_a_stream_that_is_left_ends_its_job(client: Anthropic, held: EchoWorker) -> None:
    with client.messages.stream(model="held", max_tokens=50, messages=QUESTION) as stream:
        assert next(iter(stream.text_stream)) == "W"
        assert held.lost == []
    until(lambda: len(held.lost) == 1, "the job is cancelled")


def test_a_whole_answer_that_is_not_waited_for_ends_its_job(
    client: Anthropic, held: EchoWorker
) -> None:
    with pytest.raises(anthropic.APITimeoutError):
        ask(client, model="held", timeout=0.5)
    until(lambda: len(held.lost) == 1, "the job is cancelled")


def _content(block: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [text_block("x"), block]}]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x/"}}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (_content(IMAGE), "messages.0.content.1: blocks of the type `image` are not served"),
        (_content({"type": "thinking"}), "blocks of the type `thinking` are not served"),
        (
            _content({"type": "tool_result", "tool_use_id": "x", "content": [IMAGE]}),
            "content.0: blocks of the type `image` are not served",
        ),
        (
            _content({"type": "tool_use", "id": "x", "name": "f", "input": {}}),
            "messages.0: content.1: a `tool_use` block cannot be the user's",
        ),
        ({"thinking": {"type": "adaptive"}}, "thinking: this parameter is not known here"),
        ({"service_tier": "auto"}, "service_tier: this parameter is not known here"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": []}]}, "must have at least one block"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"extra_body": {"temperature": 3}}, "temperature=3"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        (
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            "tool_choice.auto.disable_parallel_tool_use",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools.0.input_schema: Field required",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(
    client: Anthropic, worker: AnswerWorker, more: dict[str, Any], text: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, **more)
    assert isinstance(caught.value.body, dict)
    error = caught.value.body["error"]
    assert error["type"] == "invalid_request_error"
    assert text in error["message"]
    assert caught.value.body["request_id"] == caught.value.request_id
    assert worker.jobs == []


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (_content({"type": "\ud83d"}), "blocks of the type `\\ud83d` are not served"),
        ({"tool_choice": {"type": "\ud83d"}}, "tool_choice: "),
        ({"system": "\ud83d"}, "lone surrogate"),
    ],
)
def test_half_a_surrogate_pair_is_refused_like_anything_else(
    url: str, more: dict[str, Any], text: str
) -> None:
    # Anthropic's client cannot send it, others' can.
    body = json.dumps({"model": MODEL, "max_tokens": 50, "messages": QUESTION} | more)
    headers = {"content-type": "application/json"}
    response = httpx2.post(f"{url}/v1/messages", content=body, headers=headers)
    assert response.status_code == 400, response.text
    assert text in response.json()["error"]["message"]


def test_max_tokens_must_be_given(url: str) -> None:
    response = httpx2.post(f"{url}/v1/messages", json={"model": MODEL, "messages": QUESTION})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "max_tokens: Field required"


def test_unknown_models_and_routes_are_not_found(client: Anthropic, url: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: ask(client, model="nobody"),
        lambda: client.messages.count_tokens(model="nobody", messages=QUESTION),
        lambda: client.messages.batches.list(),
    ]
    for call in calls:
        with pytest.raises(anthropic.NotFoundError) as caught:
            call()
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "not_found_error"
    assert "error" in httpx2.get(f"{url}/nowhere").json()


@pytest.mark.slow
def test_a_real_worker_counts_the_tokens_that_its_prompt_will_have(
    server: RedisServer, client: Anthropic, url: str, tmp_path: Path
) -> None:
    folder = write_hf_checkpoint(tmp_path / "real", tiny_config(vocab_size=512))
    write_byte_level_json(folder)
    options = ("--context-length", "256", "--device", "cpu", "--kv-cache-gib", "0.01")
    with WorkerProcess(server.url, "w1", tmp_path, "--model-path", folder, *options):
        until(lambda: httpx2.get(f"{url}/v1/models/real").status_code == 200, "it is known")
        counted = client.messages.count_tokens(model="real", messages=QUESTION, system="Be brief.")
        message = ask(client, model="real", max_tokens=2, system="Be brief.")
        assert counted.input_tokens == message.usage.input_tokens > len("Weather in Paris?") / 2
        with client.messages.stream(
            model="real", max_tokens=2, messages=QUESTION, system="Be brief."
        ) as stream:
            first = next(iter(stream))
            assert first.type == "message_start"
            assert first.message.usage.input_tokens == counted.input_tokens
        with pytest.raises(anthropic.BadRequestError, match="context of 256 tokens"):
            ask(client, model="real", max_tokens=300)
