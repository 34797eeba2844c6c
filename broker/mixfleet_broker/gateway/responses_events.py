"""The events of a response: a function of its record and its job's channel, and of nothing else.

Whoever reads the channel from its first event gets the same events under the same numbers, on any
gateway and at any time. So a reader that was cut off goes on anywhere, by the number of the last
event that it saw. How often the job was started does not show: a run goes on where the one before
it ended, and the channel keeps how the answer was cut into chunks.
"""

from collections.abc import Sequence
from typing import Any, Final

from mixfleet_broker.gateway import sse
from mixfleet_broker.gateway.api_errors import INVALID, error_of_end
from mixfleet_broker.gateway.responses_items import Status
from mixfleet_broker.gateway.responses_output import Event, OutputItems
from mixfleet_broker.messages import JobEnd, JobEvent, RunStarted, TokenChunk, Usage
from mixfleet_broker.responses_store import StoredResponse

PREFIX: Final = "resp_"


def response_id(job_id: str) -> str:
    """Return the id of the response that a job answers."""
    return f"{PREFIX}{job_id}"


def event_bytes(events: Sequence[Event]) -> bytes:
    """Return events as a stream carries them."""
    return b"".join(sse.data(event, event["type"]) for event in events)


class ResponseEvents:
    """One reading of a channel, from its first event on.

    Args:
        record: Of the response.
    """

    def __init__(self, record: StoredResponse) -> None:
        self._record = record
        self._output = OutputItems(
            record.job_id, has_logprobs=record.request.get("top_logprobs") is not None
        )
        self._num_events = 0
        self._status = "queued"
        self._error: dict[str, Any] | None = None
        self._usage: Usage | None = None
        self._end: JobEnd | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing comes any more."""
        return self._end is not None

    @property
    def has_started(self) -> bool:
        """Whether a worker has taken the job, or it has ended without one."""
        return self._status != "queued"

    def begin(self) -> list[Event]:
        """Return the events before any of the channel; call it once, first."""
        return self._numbered([self._told("created"), self._told("queued")])

    def take(self, event: JobEvent) -> list[Event]:
        """Return what an event of the channel gives."""
        if isinstance(event, RunStarted) and not self.has_started:
            self._status = "in_progress"
            return self._numbered([self._told("in_progress")])
        if isinstance(event, TokenChunk):
            return self._numbered(self._output.take(event))
        if isinstance(event, JobEnd):
            return self._numbered(self._ended(event))
        return []

    def response(self) -> dict[str, Any]:
        """Return the response as far as it has come."""
        is_cut = self._status == "incomplete"
        return {
            "id": response_id(self._record.job_id),
            "object": "response",
            "created_at": self._record.created_at,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            **self._record.request,
            "output": self._output.values(),
            "usage": _usage_value(self._usage) if self._usage is not None else None,
        }

    def check_answered(self) -> None:
        """Raise if the job failed, for a request that has no other way to say so."""
        failure = error_of_end(self._end, self._record.job_id) if self._end is not None else None
        if failure is not None and self._status == "failed":
            raise failure

    def lost(self) -> dict[str, Any]:
        """Return the response of a job that went away before any gateway saw its end."""
        text = "the job is not there any more, and nobody saw how it ended"
        self._error = {"code": "server_error", "message": text, "type": "unknown_job"}
        self._status = "failed"
        return self.response()

    def _ended(self, end: JobEnd) -> list[Event]:
        self._end = end
        self._usage = end.usage
        events: list[Event] = []
        if end.state == "finished":
            reached: Status = "incomplete" if end.finish_reason == "length" else "completed"
            events, self._status = self._output.end(reached), reached
        else:
            self._output.break_off()
            self._status = "cancelled" if end.state == "canceled" else "failed"
            if self._status == "failed":
                self._error = _error_value(end, self._record.job_id)
        return [*events, self._told(self._status)]

    def _told(self, kind: str) -> Event:
        return {"type": f"response.{kind}", "response": self.response()}

    def _numbered(self, events: Sequence[Event]) -> list[Event]:
        first = self._num_events
        self._num_events += len(events)
        return [
            {**event, "sequence_number": number} for number, event in enumerate(events, start=first)
        ]


def _error_value(end: JobEnd, job_id: str) -> dict[str, Any] | None:
    error = error_of_end(end, job_id)
    if error is None:
        return None
    # `code` has few values that clients know, so our own name of the error is its type.
    code = "invalid_prompt" if error.kind == INVALID else "server_error"
    return {"code": code, "message": error.message, "type": error.code}


def _usage_value(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
