"""OpenAI's files and batches, with its own client: what a user sends and what comes back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from support.batches import (
    CHAT,
    answers,
    begin,
    chat_line,
    chat_lines,
    counts,
    ended,
    errors,
    jsonl,
    results,
)
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.openai_client import openai_client
from support.queue_jobs import MODEL
from support.redis_server import RedisServer

OPTIONS = ("--max-body-bytes", "4096", "--batch-max-bytes", "65536", "--batch-max-lines", "20")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    folder: Path = tmp_path_factory.mktemp("gateway")
    with (
        RedisServer() as server,
        EchoWorker(server.url),
        GatewayProcess(server.url, folder, *OPTIONS) as process,
    ):
        yield process
        assert "Traceback" not in process.log


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[OpenAI]:
    with openai_client(gateway) as client:
        yield client


def test_a_file_of_chats_is_answered_line_by_line(client: OpenAI) -> None:
    batch = ended(client, begin(client, chat_lines(5), metadata={"night": "1"}))
    assert batch.status == "completed"
    assert counts(batch) == (5, 5, 0)
    assert answers(client, batch) == {f"r{i}": f"question {i}" for i in range(5)}
    assert batch.error_file_id is None
    assert batch.metadata == {"night": "1"}
    assert batch.usage is not None
    assert batch.usage.output_tokens == 5 * len("question 0")
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert None not in times
    assert list(times) == sorted(times, key=lambda at: at or 0)
    assert batch.expires_at == batch.created_at + 86_400


def test_completions_are_answered_too(client: OpenAI) -> None:
    body = {"model": MODEL, "prompt": ["ab", "cd"], "max_tokens": 9}
    line = {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": body}
    batch = ended(client, begin(client, [line], endpoint="/v1/completions"))
    [result] = results(client, batch.output_file_id)
    assert [choice["text"] for choice in result["response"]["body"]["choices"]] == ["ab", "cd"]


def test_files_are_kept_listed_read_and_deleted(client: OpenAI) -> None:
    data = jsonl(chat_lines(2))
    made = client.files.create(file=("mine.jsonl", data), purpose="batch")
    assert (made.filename, made.bytes, made.purpose) == ("mine.jsonl", len(data), "batch")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == data
    assert client.files.list(limit=1).data == [made]
    assert client.files.delete(made.id).deleted
    for gone in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError, match="no file"):
            gone(made.id)


def test_batches_are_listed_the_latest_first_page_by_page(client: OpenAI) -> None:
    made = [begin(client, chat_lines(1)).id for _ in range(3)]
    first = client.batches.list(limit=2)
    assert [batch.id for batch in first.data] == made[:0:-1]
    assert first.has_more
    assert client.batches.list(limit=1, after=made[1]).data[0].id == made[0]
    with pytest.raises(openai.BadRequestError, match="after: no 'x'"):
        client.batches.list(after="x")


BAD: dict[str, tuple[Any, int, str, str]] = {
    "an unknown field": (chat_line("x", "a", nope=1), 400, "unknown_parameter", "nope"),
    "a stream": (chat_line("x", "a", stream=True), 400, "unsupported_value", "stream"),
    "a bad value": (chat_line("x", "a", temperature=-1), 400, "message", "temperature"),
    "another model": (chat_line("x", "a", model="other"), 404, "model_not_found", "not served"),
    "another url": (
        {**chat_line("x", "a"), "url": "/v1/embeddings"},
        400,
        "mismatched_endpoint",
        "batch's endpoint is /v1/chat/completions",
    ),
    "a GET": ({**chat_line("x", "a"), "method": "GET"}, 400, "invalid_value", "method"),
    "no body": ({"custom_id": "x", "method": "POST", "url": CHAT}, 400, "invalid_value", "body"),
}
BAD_WITHOUT_ID: dict[str, tuple[Any, int, str, str]] = {
    "no JSON": ("what", 400, "invalid_json_line", "line 2 is no JSON"),
    "no object": ("[1]", 400, "invalid_json_line", "line 2 is no JSON object"),
    "depth": ("[" * 3000, 400, "invalid_json_line", "line 2 is no JSON"),
    "no id": ({"method": "POST", "url": CHAT, "body": {}}, 400, "invalid_value", "custom_id"),
    "too long": (chat_line("x", "y" * 5000), 413, "body_too_large", "the limit is 4096"),
}


@pytest.mark.parametrize("what", [*BAD, *BAD_WITHOUT_ID])
def test_a_bad_line_gets_its_own_error_and_hurts_no_other(client: OpenAI, what: str) -> None:
    line, status, code, words = {**BAD, **BAD_WITHOUT_ID}[what]
    batch = ended(client, begin(client, [chat_line("a", "A"), line, chat_line("b", "B")]))
    assert batch.status == "completed"
    assert counts(batch) == (3, 2, 1)
    assert answers(client, batch) == {"a": "A", "b": "B"}
    [(custom_id, (found_status, error))] = errors(client, batch).items()
    assert custom_id == ("x" if what in BAD else None)
    assert (found_status, error["code"]) == (status, error["code"] if code == "message" else code)
    assert words in error["message"]


def test_ids_that_stand_twice_are_refused_with_their_lines(client: OpenAI) -> None:
    lines = [chat_line(i, "q") for i in ("a", "b", "a", "c", "b")]
    batch = ended(client, begin(client, lines))
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert counts(batch) == (5, 0, 0)
    assert batch.errors is not None
    found = [(e.code, e.line, e.message) for e in batch.errors.data or []]
    text = "custom_id {!r} of line {} is that of line {}: each must be unique"
    assert found == [
        ("duplicate_custom_id", 3, text.format("a", 3, 1)),
        ("duplicate_custom_id", 5, text.format("b", 5, 2)),
    ]


def test_a_file_without_requests_fails(client: OpenAI) -> None:
    batch = ended(client, begin(client, ["", "  "]))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [error.code for error in batch.errors.data or []] == ["empty_file"]


def test_blank_lines_are_no_requests_but_count_as_lines(client: OpenAI) -> None:
    batch = ended(client, begin(client, ["", chat_line("a", "A"), "", "what"]))
    assert counts(batch) == (2, 1, 1)
    assert "line 4" in errors(client, batch)[None][1]["message"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{}\n" * 21, "more than 20 lines, which is the limit"),
        (b"x" * 65_537, "more than 65536 bytes, which is the limit"),
        (b"x" * 200_000, "the limit is 131072"),
    ],
)
def test_a_file_that_is_too_large_is_refused_with_the_numbers(
    client: OpenAI, data: bytes, words: str
) -> None:
    before = client.files.list().data
    with pytest.raises(openai.APIStatusError, match=words) as refused:
        client.files.create(file=("x.jsonl", data), purpose="batch")
    assert refused.value.status_code == 413
    assert client.files.list().data == before


def test_one_call_takes_the_lines_and_gives_the_batch(
    gateway: GatewayProcess, client: OpenAI
) -> None:
    with gateway.client() as http:
        made = http.post(f"{CHAT}/batch?completion_window=1h", content=jsonl(chat_lines(3)))
        assert made.status_code == 200
        assert made.json()["completion_window"] == "1h"
        batch = ended(client, client.batches.retrieve(made.json()["id"]))
        assert answers(client, batch) == {f"r{i}": f"question {i}" for i in range(3)}
        too_many = http.post(f"{CHAT}/batch", content=b"{}\n" * 21)
        assert too_many.json()["error"]["details"] == {"unit": "lines", "limit": 20}


def test_a_batch_asked_for_twice_under_one_key_is_one_batch(client: OpenAI) -> None:
    file = client.files.create(file=("x.jsonl", jsonl(chat_lines(1))), purpose="batch")
    made = {
        client.batches.create(
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="24h",
            extra_headers={"idempotency-key": "once"},
        ).id
        for _ in range(2)
    }
    assert len(made) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"completion_window": "soon"}, "completion_window: 'soon', must be a time such as 24h"),
        ({"completion_window": "31d"}, "at most 30d"),
        ({"endpoint": "/v1/embeddings"}, "endpoint: Input should be"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(
    client: OpenAI, changed: dict[str, Any], words: str
) -> None:
    file = client.files.create(file=("x.jsonl", jsonl(chat_lines(1))), purpose="batch")
    options: Any = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError, match=words):
        client.batches.create(**{**options, **changed})


def test_what_is_not_there_is_404(client: OpenAI) -> None:
    nowhere = f"file-{'0' * 32}"
    with pytest.raises(openai.NotFoundError, match="no file"):
        client.batches.create(input_file_id=nowhere, endpoint=CHAT, completion_window="24h")
    for asked in ("x", f"batch_{'0' * 32}"):
        for call in (client.batches.retrieve, client.batches.cancel):
            with pytest.raises(openai.NotFoundError, match=f"no batch '{asked}'"):
                call(asked)


def test_only_files_for_batches_are_taken(gateway: GatewayProcess, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose: 'user_data', must be batch"):
        client.files.create(file=("x.jsonl", b"{}"), purpose="user_data")
    with gateway.client() as http:
        assert http.post("/v1/files", json={}).status_code == 400
        other = http.post("/v1/files", data={"purpose": "batch"}, files={"other": b"x"})
        assert other.status_code == 400
        assert other.json()["error"]["message"] == "file: is missing"
