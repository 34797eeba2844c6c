"""Values that several of OpenAI's objects share."""

from collections.abc import Sequence
from typing import Any

from mixfleet_broker.gateway import sse
from mixfleet_broker.messages import JobEnd, TokenLogprob, Usage
from mixfleet_broker.records import JobInfo
from mixfleet_broker.tool_call_text import parse_tool_calls


def usage_value(usages: Sequence[Usage], per_prompt: int | None = None) -> dict[str, int]:
    """Return the usage of a request: a prompt counts once, however many choices it has.

    Args:
        usages: Of the choices, in order.
        per_prompt: Choices of each prompt; None: there is one prompt.
    """
    n = per_prompt or max(1, len(usages))
    prompts = (usages[begin : begin + n] for begin in range(0, len(usages), n))
    prompt = sum(max(usage.prompt_tokens for usage in choices) for choices in prompts)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def finish_reason(end: JobEnd | None, *, has_calls: bool) -> str | None:
    """Return why an answer ended, in OpenAI's words."""
    reason = end.finish_reason if end is not None else None
    return "tool_calls" if reason == "stop" and has_calls else reason


def tool_call_values(job_id: str, text: str) -> list[dict[str, Any]]:
    """Return the tool calls that the model wrote whole."""
    if not text:
        return []
    return [
        {
            "id": call.call_id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in parse_tool_calls(job_id, text).calls
    ]


def of_text(logprobs: Sequence[TokenLogprob]) -> list[TokenLogprob]:
    """Return those of the tokens that are text: OpenAI tells nothing of the one that ends it."""
    return [entry for entry in logprobs if not entry.is_control]


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return log-probabilities as chat completions have them."""
    return {
        "content": [
            {
                **_token(entry.token, entry.logprob),
                "top_logprobs": [_token(token, logprob) for token, logprob in entry.top],
            }
            for entry in of_text(logprobs)
        ],
        "refusal": None,
    }


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode(errors="replace"), "logprob": logprob, "bytes": list(token)}


def waiting_comment(info: JobInfo) -> bytes:
    """Return what a stream says while its job waits: clients skip it, people read it."""
    words: list[str] = [info.outlook]
    if info.position is not None:
        words.append(f"position={info.position}")
    if info.eta_s is not None:
        words.append(f"eta={info.eta_s:.1f}s")
    if info.waited_s is not None:
        words.append(f"waited={info.waited_s:.1f}s")
    return sse.comment(" ".join(words))
