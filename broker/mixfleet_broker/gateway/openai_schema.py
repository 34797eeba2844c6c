"""Bodies of OpenAI's chat and completion requests: known fields only, each with its limits.

What is not known here is refused by its name, what is known and cannot be had too, and only fields
that change nothing about an answer may be ignored.
"""

import json
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.messages import (
    ChatMessage,
    OutputFormat,
    SamplingSettings,
    ToolCall,
    ToolSpec,
)
from mixfleet_broker.terms import Priority

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
_MAX_ID_DIGITS = 10


class Body(BaseModel):
    """A body, or a part of one, that holds known fields only."""

    model_config = ConfigDict(extra="forbid", strict=False)


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Body):
    """What chat and completion requests share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False
    service_tier: Literal["auto", "default", "priority", "flex"] | None = None
    # Accepted, and of no effect on an answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    store: bool | None = None

    @field_validator("seed")
    @classmethod
    def _seed(cls, seed: int | None) -> int | None:
        # OpenAI's seeds may be negative; ours are 63 bits.
        return None if seed is None else seed & (2**63 - 1) if -(2**63) <= seed < 0 else seed

    def settings(self, max_tokens: int | None, logprobs: int | None) -> SamplingSettings:
        """Return the settings of the wire, which checks their limits."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingSettings(
            temperature=self.temperature,
            # -1 is vLLM's word for all tokens.
            top_k=0 if self.top_k == -1 else self.top_k,
            top_p=self.top_p,
            max_tokens=max_tokens,
            stop=stop,
            seed=self.seed,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_biases(self.logit_bias or {}),
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
        )

    def priority(self) -> Priority | None:
        """Return the class that OpenAI's service tiers stand for."""
        tiers: dict[str, Priority] = {"priority": "interactive", "flex": "batch"}
        return tiers.get(self.service_tier or "")


class FunctionCall(Body):
    """A call's name and arguments."""

    name: str
    arguments: str


class CallPart(Body):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class TextPart(Body):
    """A piece of a message's text."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


class MessageBody(Body):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CallPart] | None = None
    tool_call_id: str | None = None
    # What assistants' messages carry when they come back from a client.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    reasoning_content: str | None = None

    def message(self, where: str) -> ChatMessage:
        """Return the message of the wire.

        Raises:
            ApiError: A role that is not served.
        """
        if self.role == "function":
            raise ApiError(
                400,
                f"{where}.role: `function` is OpenAI's old form; use `tool`",
                code="unsupported_value",
                param=f"{where}.role",
            )
        return ChatMessage(
            role="system" if self.role == "developer" else self.role,
            content=text_of(self.content),
            tool_calls=tuple(
                ToolCall(call_id=c.id, name=c.function.name, arguments=c.function.arguments or "{}")
                for c in self.tool_calls or ()
            ),
            call_id=self.tool_call_id,
        )


class FunctionBody(Body):
    """A function that may be called."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool."""

    type: Literal["function"]
    function: FunctionBody

    def spec(self) -> ToolSpec:
        """Return the tool of the wire."""
        return ToolSpec(
            name=self.function.name,
            description=self.function.description or "",
            parameters=json.dumps(self.function.parameters or {}),
        )


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A schema that the answer must have."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class ResponseFormat(Body):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def output_format(self) -> OutputFormat | None:
        """Return the format of the wire; None for text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return OutputFormat(kind="json_object")
        if self.json_schema is None:
            raise ApiError(
                400,
                "response_format.json_schema: is missing",
                code="missing_required_parameter",
                param="response_format.json_schema",
            )
        return OutputFormat(kind="json_schema", schema=json.dumps(self.json_schema.schema_))


class ChatBody(Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[MessageBody], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    def num_logprobs(self) -> int | None:
        """Return how many likely tokens are asked for; None for no log-probabilities at all."""
        if not self.logprobs:
            if self.top_logprobs is not None:
                raise ApiError(
                    400,
                    "top_logprobs: needs logprobs to be true",
                    code="invalid_value",
                    param="top_logprobs",
                )
            return None
        return self.top_logprobs or 0

    def most_tokens(self) -> int | None:
        """Return the longest answer, by either of its two names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def choice_of_tool(self) -> str:
        """Return the tool choice as the wire writes it."""
        if isinstance(self.tool_choice, NamedTool):
            return f"={self.tool_choice.function.name}"
        return self.tool_choice or "auto"


def of_choice(settings: SamplingSettings, index: int) -> SamplingSettings:
    """Return the settings of one of several choices: a common seed would make them all equal."""
    if settings.seed is None or index == 0:
        return settings
    return replace(settings, seed=(settings.seed + index) % 2**63)


def unsupported(param: str, text: str) -> ApiError:
    """Return the refusal of a known parameter that cannot be had as it is given."""
    return ApiError(400, f"{param}: {text}", code="unsupported_value", param=param)


def text_of(content: str | list[TextPart] | None) -> str:
    """Return the whole text of a message's content."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or part.refusal for part in content)


def _biases(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    biases = []
    for name, bias in given.items():
        if not (name.isascii() and name.isdigit() and len(name) <= _MAX_ID_DIGITS):
            raise ApiError(
                400,
                f"logit_bias.{name[:40]}: must be a token's id",
                code="invalid_value",
                param="logit_bias",
            )
        biases.append((int(name), bias))
    return tuple(sorted(biases))
