"""Whole answers through a real gateway, read by Anthropic's own client as it is."""

import json
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import Anthropic

from mixfleet_broker.messages import ChatMessage, SamplingSettings
from mixfleet_broker.tool_call_text import tool_call_id
from support.answer_worker import NUM_PROMPT_TOKENS, AnswerWorker, Scripted
from support.anthropic_requests import (
    CALL,
    HELLO,
    MODEL,
    QUESTION,
    SAMPLING,
    TOOL,
    ask,
    streamed,
    text_block,
    text_of,
)
from support.redis_server import RedisServer
from support.tiny_model import tiny_config, write_hf_checkpoint
from support.tokenizer_files import write_byte_level_json
from support.worker_process import WorkerProcess, until


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


def test_what_models_write_beyond_json_is_still_an_answer(
    client: Anthropic, worker: AnswerWorker
) -> None:
    text = '[{"name": "weather", "arguments": {"city": NaN, "half": "\\ud83d"}}]'
    worker.script.append(Scripted((("tool_calls", text),)))
    (call,) = ask(client, tools=[TOOL]).content
    assert call.type == "tool_use"
    assert call.input == {"city": "NaN", "half": "\ud83d"}


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
