"""Tool calls from the client over a real Redis to a whole worker, and back."""

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mixfleet import Client, TokenChunk, ToolCall
from mixfleet.errors import InvalidMessagesError
from mixfleet_broker.settings import Settings
from mixfleet_broker.tool_call_text import tool_call_id
from mixfleet_engine.request import StepOutput
from support.byte_tokenizer import ByteTokenizer
from support.scripted_engine import ScriptedEngine
from support.scripted_worker import ScriptedWorker
from support.worker_jobs import MODEL

pytestmark = pytest.mark.slow  # an idle worker looks up once a second, also to end

TOKENIZER = ByteTokenizer(adds_tool_tokens=True)
CALLS = TOKENIZER.control_id("[TOOL_CALLS]") or 0
EOS = TOKENIZER.eos_id or 0
CALLS_TEXT = '[{"name": "clock", "arguments": {"zone":  "Zürich"}}, {"name": "dice"}]'
ANSWER = [*b"I look.", CALLS, *CALLS_TEXT.encode(), EOS]
MIDDLE = len(b"I look.") + 1 + CALLS_TEXT.encode().index("ü".encode()) + 1
"""In the middle of a character in the middle of the arguments."""
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name}} for name in ("clock", "dice")
]


class StuckEngine(ScriptedEngine):
    """Says all but the last token of its answer, and then nothing more."""

    def __init__(self, answer: list[int]) -> None:
        super().__init__([answer])
        self._never = threading.Event()

    def step(self) -> list[StepOutput]:
        if len(self._left) > 1:
            return super().step()
        self._never.wait(0.005)  # as long as a step takes
        return []


class SteppingEngine(ScriptedEngine):
    """Says several tokens a step, as an engine does that guesses ahead."""

    def step(self) -> list[StepOutput]:
        outputs = super().step()
        while self.has_work and len(outputs) < 5:
            outputs += super().step()
        return [
            StepOutput(
                request_id=outputs[0].request_id,
                token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
                finish_reason=outputs[-1].finish_reason,
            )
        ]


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(settings=Settings(redis=redis_url), model=MODEL) as client:
        yield client


def worker(
    url: str, engine: ScriptedEngine, name: str = "mistral-v3", worker_id: str = "w1"
) -> ScriptedWorker:
    return ScriptedWorker(url, worker_id, engine, TOKENIZER, name)


def calls_of(job_id: str) -> tuple[ToolCall, ...]:
    return (
        ToolCall(call_id=tool_call_id(job_id, 0), name="clock", arguments='{"zone":  "Zürich"}'),
        ToolCall(call_id=tool_call_id(job_id, 1), name="dice", arguments="{}"),
    )


@pytest.mark.parametrize("kind", [ScriptedEngine, SteppingEngine])
def test_a_model_calls_tools_and_goes_on_with_their_results(
    kind: type[ScriptedEngine], client: Client, redis_url: str
) -> None:
    engine = kind([ANSWER, [*b"Noon.", EOS]])
    with worker(redis_url, engine):
        stream = client.chat("What time?", tools=TOOLS, max_tokens=200, stop=["Zürich"])
        assert "".join(stream) == "I look."
        assert stream.tool_calls == calls_of(stream.job_id)
        assert stream.result().finish_reason == "stop"
        history: list[dict[str, Any]] = [
            {"role": "user", "content": "What time?"},
            {"role": "assistant", "content": stream.text, "tool_calls": stream.tool_calls},
        ]
        history += [
            {"role": "tool", "content": "noon", "tool_call_id": call.call_id}
            for call in stream.tool_calls
        ]
        result = client.chat(history, tools=TOOLS, max_tokens=200).result()
    assert (result.text, result.tool_calls) == ("Noon.", ())
    prompt = bytes(i for i in engine.requests[1].prompt_token_ids if i < 256).decode()
    first, second = (call.call_id for call in stream.tool_calls)
    assert re.findall(r'id": "(\w+)"', prompt) == [first, second, first, second]


def test_calls_that_another_worker_continues_are_as_if_one_had_written_them(
    client: Client, redis_url: str
) -> None:
    stream = client.chat("What time?", tools=TOOLS, max_tokens=200)
    with worker(redis_url, StuckEngine([*ANSWER[:MIDDLE], EOS]), worker_id="first"):
        num_tokens = 0
        while num_tokens < MIDDLE:
            event = stream.next_event(20.0)
            assert event is not None
            num_tokens = event.num_tokens if isinstance(event, TokenChunk) else num_tokens
        assert stream.tool_calls == ()
    rest = ScriptedEngine([ANSWER[MIDDLE:]])
    with worker(redis_url, rest, worker_id="second"):
        result = stream.result()
    assert rest.requests[0].output_token_ids == tuple(ANSWER[:MIDDLE])
    assert result.worker_ids == ("first", "second")
    assert (result.text, result.tool_calls) == ("I look.", calls_of(stream.job_id))
    again = client.attach(stream.job_id).result()
    assert (again.text, again.tool_calls) == (result.text, result.tool_calls)


def test_a_model_without_tools_refuses_the_one_job_and_serves_the_next(
    client: Client, redis_url: str
) -> None:
    with worker(redis_url, ScriptedEngine([[*b"Hi", EOS]]), name="mistral-v1"):
        with pytest.raises(InvalidMessagesError, match=r"knows no tools.*mistral-v1"):
            client.chat("What time?", tools=TOOLS, max_tokens=9).result()
        assert client.chat("Hello", max_tokens=9).result().text == "Hi"
