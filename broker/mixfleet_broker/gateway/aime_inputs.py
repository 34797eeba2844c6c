"""From the parameters of a request in AIME's form to a job: every one is checked, none is cut.

A conversation is ``chat_context`` with ``prompt_input`` as the user's next turn. Without a context
``prompt_input`` is plain text that the model continues, as AIME's worker for Mixtral does it.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, Final, cast

from mixfleet_broker.gateway.aime_endpoints import IMPLICIT_INPUTS, Endpoint, Input
from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.messages import ChatJob, ChatMessage, Role, SamplingSettings

ROLES: Final = ("system", "user", "assistant")
_NOTHING: Final = frozenset({"", "null", "undefined", "None"})
"""What JavaScript and Python make of a missing value in a query."""
_SWITCHES: Final = {"true": True, "1": True, "false": False, "0": False}


def read_inputs(endpoint: Endpoint, given: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    """Return the value of each input of an endpoint, its default where it was not given.

    Args:
        endpoint: Says what there is, and its limits.
        given: As it came.
        as_text: Whether it came in a query, where numbers are texts.

    Raises:
        ApiError: One is unknown, missing, of another type or out of its limits.
    """
    names = {one.name for one in endpoint.inputs}
    for name in given:
        if name not in names and name not in IMPLICIT_INPUTS:
            known = ", ".join(one.name for one in endpoint.inputs)
            raise _wrong(name[:80], f"is not known here; known are {known}", "unknown_parameter")
    values = {}
    for one in endpoint.inputs:
        value = given.get(one.name)
        if value is None:  # clients send null for what is not set
            if one.required:
                raise _wrong(one.name, "is missing", "missing_required_parameter")
            value = one.default
        else:
            value = _value(one, value, as_text=as_text)
        values[one.name] = value
    return values


def read_text(given: Mapping[str, Any], name: str) -> str | None:
    """Return a key or an id that was given; None where it was not."""
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise _wrong(name, f"must be a text, is {type(value).__name__}")
    return None if value is None or value in _NOTHING else value


def waits_for_result(given: Mapping[str, Any]) -> bool:
    """Return whether the answer is to be the whole result; it is unless said otherwise."""
    value = given.get("wait_for_result")
    if value is None:
        return True
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _SWITCHES:
        return _SWITCHES[value.lower()]
    raise _wrong("wait_for_result", f"is {value!r:.40}, must be true or false")


def chat_job(endpoint: Endpoint, values: Mapping[str, Any], job_id: str) -> ChatJob:
    """Return the job that the inputs of a request ask for.

    Raises:
        ApiError: There is no question, or the context is no conversation.
    """
    messages, prompt = _question(values)
    top_p, top_k = values.get("top_p"), values.get("top_k")
    if top_p == 0:  # the smallest nucleus there is: the most likely token alone
        top_p, top_k = None, 1
    seed = values.get("seed")
    return ChatJob(
        job_id=job_id,
        model=endpoint.model,
        messages=messages,
        prompt=prompt,
        sampling=SamplingSettings(
            temperature=values.get("temperature"),
            top_k=top_k,
            top_p=top_p,
            max_tokens=values.get("max_gen_tokens"),
            # -1 is AIME's word for a random one.
            seed=None if seed is not None and seed < 0 else seed,
        ),
    )


def _question(values: Mapping[str, Any]) -> tuple[tuple[ChatMessage, ...], str | None]:
    context = _context(values.get("chat_context"))
    text, plain = values.get("prompt_input") or "", values.get("text_context") or ""
    if context and plain:
        raise _wrong("text_context", "cannot be given beside chat_context")
    if context:
        messages = [_message(item, f"chat_context[{i}]") for i, item in enumerate(context)]
        if text:
            messages.append(ChatMessage(role="user", content=text))
        return tuple(messages), None
    if not (plain or text):
        raise _wrong("prompt_input", "is empty, and so is chat_context: there is no question")
    return (), plain + text


def _context(value: Any) -> list[Any]:
    """Return the turns of a context: a list, or JSON of one; none where it is empty."""
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _wrong("chat_context", f"is no JSON: {str(error)[:100]}") from None
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong("chat_context", f"must be a list of turns, is {type(value).__name__}")
    return value


def _message(item: Any, where: str) -> ChatMessage:
    if not isinstance(item, dict):
        raise _wrong(where, f"must be an object, is {type(item).__name__}")
    role = item.get("role")
    if role not in ROLES:
        raise _wrong(f"{where}.role", f"is {role!r:.40}, must be one of {', '.join(ROLES)}")
    return ChatMessage(
        role=cast("Role", role), content=_content(item.get("content"), f"{where}.content")
    )


def _content(value: Any, where: str) -> str:
    """Return a turn's text: it is one, or a list of texts in the newer form of contexts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong(where, f"must be a text, is {type(value).__name__}")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _wrong(where, f"holds {kind!r:.40}: the models here read text only")
    return "".join(part["text"] for part in value)


def _value(one: Input, value: Any, *, as_text: bool) -> Any:
    if one.type in ("integer", "float"):
        return _number(one, value, as_text=as_text)
    if one.name == "chat_context":
        return _context(value)
    if not isinstance(value, str):
        raise _wrong(one.name, f"must be a text, is {type(value).__name__}")
    if one.max_length is not None and len(value) > one.max_length:
        raise _wrong(one.name, f"has {len(value)} characters, the limit is {one.max_length}")
    return value


def _number(one: Input, value: Any, *, as_text: bool) -> float:
    whole = one.type == "integer"
    what = "a whole number" if whole else "a number"
    if as_text:
        try:
            value = int(value) if whole else float(value)
        except ValueError:
            raise _wrong(one.name, f"is {value!r:.40}, must be {what}") from None
    kinds = int if whole else (int, float)
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, kinds) or not is_finite:
        raise _wrong(one.name, f"is {value!r:.40}, must be {what}")
    low, high = one.minimum, one.maximum
    if low is not None and value < low:
        raise _wrong(one.name, f"is {value}, must be at least {low}")
    if high is not None and value > high:
        raise _wrong(one.name, f"is {value}, must be at most {high}")
    return cast("float", value)


def _wrong(name: str, text: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{name}: {text}", code=code, param=name)
