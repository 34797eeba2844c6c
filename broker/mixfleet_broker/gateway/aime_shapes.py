"""The bodies of AIME's interface: its names, and ours beside them.

Times are Unix times by Redis's clock, durations seconds; what is not known is left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final

from mixfleet_broker.gateway.aime_endpoints import Endpoint
from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.jobs import JobRow
from mixfleet_broker.messages import JobEnd, JobEvent, RunStarted, TokenChunk
from mixfleet_broker.records import JobInfo
from mixfleet_broker.registry import TAKES_NONE, WorkerRecord

_NOT_KNOWN: Final = -1
_OF_JOBS: Final = ("job_id", "job_state")
"""What AIME's clients look for beside an error, not below it."""


@dataclass(slots=True)
class Text:
    """An answer as far as it has come."""

    parts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    worker_id: str | None = None
    end: JobEnd | None = None

    @classmethod
    def of(cls, events: Iterable[JobEvent]) -> "Text":
        """Return what the events of a job's channel tell."""
        answer = cls()
        for event in events:
            answer.take(event)
        return answer

    def take(self, event: JobEvent) -> None:
        """Add what came."""
        if isinstance(event, TokenChunk):
            self.parts.append(event.text)
            self.num_tokens = event.num_tokens
            self.num_prompt_tokens = event.num_prompt_tokens or self.num_prompt_tokens
        elif isinstance(event, RunStarted):
            self.worker_id = event.worker_id
        elif isinstance(event, JobEnd):
            self.end = event
            if event.usage is not None:
                self.num_prompt_tokens = event.usage.prompt_tokens
                self.num_tokens = event.usage.completion_tokens

    def outputs(self) -> dict[str, Any]:
        """Return what changes while it grows, by AIME's names."""
        return {
            "text": "".join(self.parts),
            "num_generated_tokens": self.num_tokens,
            "current_context_length": self.num_prompt_tokens + self.num_tokens,
            "prompt_length": self.num_prompt_tokens,
        }


def error_body(error: ApiError, endpoint: Endpoint | None) -> dict[str, Any]:
    """Return an error as AIME's clients read it, with its stable name and numbers beside."""
    body: dict[str, Any] = {"success": False, "error": error.message, "code": error.code}
    if endpoint is not None:
        body["ep_version"] = endpoint.version
    body |= {name: error.details[name] for name in _OF_JOBS if name in error.details}
    numbers = {name: value for name, value in error.details.items() if name not in _OF_JOBS}
    if numbers:
        body["details"] = numbers
    return body


def result_body(
    endpoint: Endpoint,
    row: JobRow,
    answer: Text,
    *,
    context_length: int | None,
    ttft_s: float | None,
) -> dict[str, Any]:
    """Return a whole answer with all that is known of its making."""
    outputs = {**answer.outputs(), "model_name": row.model, "max_seq_len": context_length}
    end = answer.end
    body = {
        **{name: outputs[name] for name in endpoint.outputs},
        **_times(row, answer.num_tokens),
        "auth": row.worker_id,
        "worker": row.worker_id,
        "worker_interface_version": f"mixfleet {version('mixfleet')}",
        "attempt": row.attempt,
        "ttft_s": ttft_s,
        "finish_reason": end.finish_reason if end is not None else None,
    }
    known = {name: value for name, value in body.items() if value is not None}
    return {"success": True, "job_id": row.job_id, "ep_version": endpoint.version, **known}


def _times(row: JobRow, num_tokens: int) -> dict[str, float | None]:
    queue_s = _between(row.submitted_at, row.started_at)
    compute_s = _between(row.started_at, row.ended_at)
    # Of a job that was begun more than once only the last run's time is known, and not its tokens.
    is_whole = row.attempt == 1 and compute_s
    return {
        # AIME's order: submitted, given to a worker, arrived there, finished, sent, received. Here
        # a worker takes a job and begins it in one step, and ends it with its result in another.
        "start_time": row.submitted_at,
        "start_time_compute": row.started_at,
        "arrival_time": row.started_at,
        "finished_time": row.ended_at,
        "result_sent_time": row.ended_at,
        "result_received_time": row.ended_at,
        # Of the time in the worker, in which nothing waits.
        "pending_duration": None if compute_s is None else 0.0,
        "compute_duration": compute_s,
        "total_duration": _between(row.submitted_at, row.ended_at),
        "queue_s": queue_s,
        "tokens_per_s": num_tokens / compute_s if is_whole and compute_s else None,
    }


def _between(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)


def progress_body(endpoint: Endpoint, row: JobRow, info: JobInfo, answer: Text) -> dict[str, Any]:
    """Return how far a job is that has not ended."""
    is_running = info.state == "started"
    outputs = answer.outputs()
    return {
        "success": True,
        "job_id": row.job_id,
        "ep_version": endpoint.version,
        "job_state": "processing" if is_running else "queued",
        "progress": {
            # AIME's clients take 0 for a job that is worked on: who waits counts from 1.
            "queue_position": 0 if info.position is None else info.position + 1,
            "estimate": _estimate(info),
            "num_workers_online": info.num_workers,
            "progress": answer.num_tokens,
            "progress_data": {name: outputs[name] for name in endpoint.progress_outputs},
        },
    }


def _estimate(info: JobInfo) -> float:
    """Return in how many seconds a job may start; -1, AIME's word, where that is not known."""
    if info.state == "started":
        return 0
    return _NOT_KNOWN if info.eta_s is None else info.eta_s


def done_body(endpoint: Endpoint, job_id: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the progress of a job that is complete; the same each time while it is kept."""
    return {
        "success": True,
        "job_id": job_id,
        "ep_version": endpoint.version,
        "job_state": "done",
        "job_result": dict(result),
    }


def details_body(
    endpoint: Endpoint,
    own: Sequence[WorkerRecord],
    *,
    num_queued: int,
    queue_limit: int,
    is_named: bool,
) -> dict[str, Any]:
    """Return what an endpoint is, who serves it, and what it takes.

    Args:
        endpoint: It.
        own: The workers of its model.
        num_queued: Its jobs that wait.
        queue_limit: How many may.
        is_named: Whether the caller may know the workers' names, which tell of hosts.
    """
    return {
        "success": True,
        "ep_version": endpoint.version,
        "name": endpoint.name,
        "title": endpoint.title,
        "description": endpoint.description,
        "http_methods": list(endpoint.methods),
        "version": endpoint.version,
        "category": endpoint.category,
        "max_queue_length": queue_limit,
        "max_time_in_queue": None,
        "free_queue_slots": max(0, queue_limit - num_queued),
        "num_active_workers": sum(worker.state not in TAKES_NONE for worker in own),
        "num_workers": len(own),
        "workers": [
            _worker_value(worker, worker.worker_id if is_named else f"worker-{number}")
            for number, worker in enumerate(own, 1)
        ],
        "parameter_description": {
            "input": {one.name: one.description() for one in endpoint.inputs},
            "output": {name: {"type": kind} for name, kind in endpoint.outputs.items()},
            "progress": {
                "output": {name: {"type": kind} for name, kind in endpoint.progress_outputs.items()}
            },
        },
    }


def _worker_value(worker: WorkerRecord, name: str) -> dict[str, Any]:
    """Return a worker by AIME's names; what a worker of ours does not tell is null."""
    return {
        "name": name,
        "state": "processing" if worker.in_flight else _state(worker),
        "max_batch_size": worker.max_batch_size,
        "free_slots": max(0, worker.max_batch_size - worker.in_flight),
        "gpu_name": None,
        "num_gpus": None,
        "framework": "mixfleet",
        "framework_version": worker.version,
        "pytorch_version": None,
        "model": {
            "label": worker.model,
            "quantization": None,
            "size": None,
            "family": None,
            "type": "LLM",
            "repo_name": None,
        },
        "max_seq_len": worker.context_length,
    }


def _state(worker: WorkerRecord) -> str:
    return "disabled" if worker.state in TAKES_NONE else "waiting"
