"""Bodies of ``POST /v1/responses``: known fields only, and what a response repeats of them."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.gateway.openai_schema import MAX_TOP_LOGPROBS, Body
from mixfleet_broker.gateway.responses_items import InputItem, messages_of
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    OutputFormat,
    SamplingSettings,
    ToolSpec,
)
from mixfleet_broker.terms import Priority

MAX_METADATA = 16
LOGPROBS = "message.output_text.logprobs"


class FunctionTool(Body):
    """A function that may be called."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def spec(self) -> ToolSpec:
        """Return the tool of the wire."""
        return ToolSpec(
            name=self.name,
            description=self.description or "",
            parameters=json.dumps(self.parameters or {}),
        )


class NamedFunctionTool(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(alias="schema", default=None)
    strict: bool | None = None

    def output_format(self) -> OutputFormat | None:
        """Return the format of the wire; None for text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return OutputFormat(kind="json_object")
        if self.schema_ is None:
            raise ApiError(
                400,
                "text.format.schema: is missing",
                code="missing_required_parameter",
                param="text.format.schema",
            )
        return OutputFormat(kind="json_schema", schema=json.dumps(self.schema_))


class Text(Body):
    """How the text of the answer is to be."""

    format: TextFormat = Field(default_factory=TextFormat)


class StreamOptions(Body):
    """Accepted: our streams have no obfuscation, whatever is asked for."""

    include_obfuscation: bool | None = None


class ResponseBody(Body):
    """``POST /v1/responses``."""

    model: str
    input: Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_output_tokens: int | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = (
        None
    )
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default", "priority", "flex"] | None = None
    # Accepted, and of no effect on an answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _items(cls, value: Any) -> Any:
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @property
    def is_stored(self) -> bool:
        """Whether it can be asked for again."""
        return self.store is not False

    def check(self) -> None:
        """Raise where fields do not go together, or could not be written back."""
        items = [item.model_dump() for item in self.input]
        for name, value in (*self.repeated().items(), ("input", items)):
            _check_text(name, value)
        if self.background and not self.is_stored:
            raise ApiError(
                400,
                "background: needs store to be true, the answer is asked for later",
                code="invalid_value",
                param="background",
            )

    def num_logprobs(self) -> int | None:
        """Return how many likely tokens are asked for; None for no log-probabilities at all."""
        if self.top_logprobs is None and LOGPROBS not in (self.include or ()):
            return None
        return self.top_logprobs or 0

    def priority(self) -> Priority | None:
        """Return the class that OpenAI's service tiers stand for."""
        tiers: dict[str, Priority] = {"priority": "interactive", "flex": "batch"}
        return tiers.get(self.service_tier or "")

    def job(self, job_id: str, before: list[InputItem]) -> ChatJob:
        """Return the job.

        Args:
            job_id: Its id.
            before: Items of the responses that this one goes on from.
        """
        system = [ChatMessage(role="system", content=self.instructions or "")]
        tools = tuple(tool.spec() for tool in self.tools or ())
        return ChatJob(
            job_id=job_id,
            model=self.model,
            messages=(
                *(system if self.instructions else ()),
                *messages_of([*before, *self.input]),
            ),
            tools=tools,
            tool_choice=self._choice_of_tool(),
            output_format=self.text.format.output_format() if self.text else None,
            sampling=SamplingSettings(
                temperature=self.temperature,
                top_p=self.top_p,
                max_tokens=self.max_output_tokens,
                logprobs=self.num_logprobs(),
            ),
        )

    def repeated(self) -> dict[str, Any]:
        """Return what the response repeats of its request."""
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        chosen = self.tool_choice or "auto"
        form = (self.text or Text()).format
        return {
            "background": bool(self.background),
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "model": self.model,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": None,
            "safety_identifier": self.safety_identifier,
            "service_tier": self.service_tier or "default",
            "store": self.is_stored,
            "temperature": self.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": chosen if isinstance(chosen, str) else chosen.model_dump(),
            "tools": tools,
            "top_logprobs": self.num_logprobs(),
            "top_p": self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }

    def _choice_of_tool(self) -> str:
        if isinstance(self.tool_choice, NamedFunctionTool):
            return f"={self.tool_choice.name}"
        return self.tool_choice or "auto"


def _check_text(name: str, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, f"{name}: holds a lone surrogate", code="invalid_value", param=name
        ) from None
    except ValueError:
        raise ApiError(
            400, f"{name}: holds a number that is not finite", code="invalid_value", param=name
        ) from None
