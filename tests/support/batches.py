"""Batches for tests: their files, their ends and their results."""

import json
from collections.abc import Iterable
from typing import Any

from openai import OpenAI
from openai.types import Batch

from support.queue_jobs import MODEL
from support.worker_process import until

CHAT: Any = "/v1/chat/completions"
ENDS = ("completed", "failed", "cancelled", "expired")


def chat_line(custom_id: str, question: str, **more: Any) -> dict[str, Any]:
    """A line of a file of requests."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": question}], **more}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def chat_lines(number: int) -> list[dict[str, Any]]:
    return [chat_line(f"r{i}", f"question {i}") for i in range(number)]


def jsonl(lines: Iterable[Any]) -> bytes:
    """A file of lines; text stands as it is."""
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    return "".join(f"{text}\n" for text in texts).encode()


def begin(client: OpenAI, lines: Iterable[Any], endpoint: Any = CHAT, **more: Any) -> Batch:
    """Upload a file and open a batch of it, as OpenAI's users do."""
    file = client.files.create(file=("requests.jsonl", jsonl(lines)), purpose="batch")
    options: Any = {"completion_window": "24h", **more}
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, **options)


def ended(client: OpenAI, batch: Batch, limit_s: float = 20.0) -> Batch:
    """The batch, once it has ended."""
    found = [batch]

    def has_ended() -> bool:
        found[:] = [client.batches.retrieve(batch.id)]
        return found[0].status in ENDS

    until(has_ended, "the batch ends", limit_s)
    return found[0]


def results(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The results in one of a batch's files, in their order; none where there is no file."""
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def answers(client: OpenAI, batch: Batch) -> dict[str, str]:
    """The text of each answer, by custom id; each id may stand there once."""
    found: dict[str, str] = {}
    for result in results(client, batch.output_file_id):
        assert result["error"] is None
        assert result["response"]["status_code"] == 200
        assert result["custom_id"] not in found
        message = result["response"]["body"]["choices"][0]["message"]
        found[result["custom_id"]] = message["content"]
    return found


def errors(client: OpenAI, batch: Batch) -> dict[str | None, Any]:
    """The error of each line that has one, by custom id."""
    found: dict[str | None, Any] = {}
    for result in results(client, batch.error_file_id):
        assert result["custom_id"] not in found
        response = result["response"]
        found[result["custom_id"]] = (
            (response["status_code"], response["body"]["error"]) if response else result["error"]
        )
    return found


def counts(batch: Batch) -> tuple[int, int, int]:
    """Total, completed and failed."""
    assert batch.request_counts is not None
    found = batch.request_counts
    return found.total, found.completed, found.failed
