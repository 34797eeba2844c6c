"""Bodies of Anthropic's messages: known fields and blocks only, turned into what the wire says.

What is not known here (``thinking`` among it) is refused by its name. ``cache_control`` is taken
without effect, wherever it stands: it asks for no other answer, only for a cheaper prompt, and the
workers' prefix cache finds equal beginnings by itself.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mixfleet_broker.messages import ChatJob, ChatMessage, SamplingSettings, ToolCall, ToolSpec

_BLOCKS = ("text", "tool_use", "tool_result")


class Body(BaseModel):
    """A body, or a part of one, that holds known fields only."""

    model_config = ConfigDict(extra="forbid")


class CacheControl(Body):
    """Where a prompt may be cut for Anthropic's cache; see the top of this file."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Cacheable(Body):
    """What may have a mark for the cache."""

    cache_control: CacheControl | None = None


class TextBlock(Cacheable):
    """A piece of text."""

    type: Literal["text"]
    text: str
    # Assistants' blocks come back with what the client's library adds to them.
    citations: None = None


class ToolUseBlock(Cacheable):
    """A call that the assistant asked for."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: None = None
    toolset_name: None = None


def _as_blocks(content: object) -> object:
    """Return a plain text as the one block that it is short for."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _readable(text: str) -> str:
    """Return ``text`` with half a surrogate pair, which pydantic cannot show, as an escape."""
    return text.encode(errors="backslashreplace").decode()


def _served(block: object) -> object:
    """Name a block that no Mixtral can read, rather than all fields that it has."""
    kind = block.get("type") if isinstance(block, dict) else None
    if isinstance(kind, str) and kind not in _BLOCKS:
        raise PydanticCustomError(
            "block_not_served",
            "blocks of the type `{kind}` are not served here, only {served}",
            {"kind": _readable(kind[:40]), "served": ", ".join(_BLOCKS)},
        )
    return block


_Text = Annotated[TextBlock, BeforeValidator(_served)]
_Texts = Annotated[list[_Text], BeforeValidator(_as_blocks)]


class ToolResultBlock(Cacheable):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: _Texts = Field(default_factory=list)
    # Accepted, and of no effect: Mixtral's formats have no mark for it, and the content says what
    # went wrong.
    is_error: bool = False
    toolset_name: None = None


_Block = Annotated[
    Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")],
    BeforeValidator(_served),
]


class MessageBody(Body):
    """One turn."""

    role: Literal["user", "assistant"]
    content: Annotated[list[_Block], BeforeValidator(_as_blocks)]

    def messages(self) -> list[ChatMessage]:
        """Return the messages of the wire, where each result of a tool is one of its own."""
        if self.role == "assistant":
            return [self._of_assistant()]
        found: list[ChatMessage] = []
        texts: list[str] = []
        for block in self.content:
            if isinstance(block, TextBlock):
                texts.append(block.text)
            elif isinstance(block, ToolResultBlock):
                found += _of_user(texts)
                texts = []
                found.append(
                    ChatMessage(
                        role="tool", content=text_of(block.content), call_id=block.tool_use_id
                    )
                )
        return found + (_of_user(texts) if texts or not found else [])

    def _of_assistant(self) -> ChatMessage:
        return ChatMessage(
            role="assistant",
            content=text_of([block for block in self.content if isinstance(block, TextBlock)]),
            tool_calls=tuple(
                ToolCall(call_id=block.id, name=block.name, arguments=json.dumps(block.input))
                for block in self.content
                if isinstance(block, ToolUseBlock)
            ),
        )


def _of_user(texts: Sequence[str]) -> list[ChatMessage]:
    return [ChatMessage(role="user", content="".join(texts))] if texts else []


def _in_its_place(message: MessageBody) -> MessageBody:
    """Raise for calls and results on the wrong side, which would be lost otherwise."""
    kind = "tool_use" if message.role == "user" else "tool_result"
    for index, block in enumerate(message.content):
        if block.type == kind:
            raise PydanticCustomError(
                "block_misplaced",
                "content.{index}: a `{kind}` block cannot be the {role}'s",
                {"index": index, "kind": kind, "role": message.role},
            )
    if message.role == "user" and not message.content:
        raise PydanticCustomError("content_empty", "content: must have at least one block")
    return message


class ToolBody(Cacheable):
    """A tool of the client's own."""

    name: str
    description: str = ""
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None

    def spec(self) -> ToolSpec:
        """Return the tool of the wire."""
        return ToolSpec(
            name=self.name,
            description=self.description,
            parameters=json.dumps(self.input_schema),
        )


class ToolChoice(Body):
    """Whether the assistant may or must call a tool."""

    type: Literal["auto", "any", "none"]
    # True cannot be had: nothing keeps a model from calling twice.
    disable_parallel_tool_use: Literal[False] = False

    def written(self) -> str:
        """Return the choice as the wire writes it."""
        return {"any": "required"}.get(self.type, self.type)


class NamedTool(Body):
    """The one tool that the assistant must call."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: Literal[False] = False

    def written(self) -> str:
        """Return the choice as the wire writes it."""
        return f"={self.name}"


class Conversation(Cacheable):
    """What a prompt is made of."""

    model: str
    messages: Annotated[
        list[Annotated[MessageBody, AfterValidator(_in_its_place)]], Field(min_length=1)
    ]
    system: _Texts = Field(default_factory=list)
    tools: list[ToolBody] = Field(default_factory=list)
    tool_choice: Annotated[ToolChoice | NamedTool, Field(discriminator="type")] | None = None

    def job(self, job_id: str, sampling: SamplingSettings) -> ChatJob:
        """Return the job of the wire, which checks its limits."""
        system = text_of(self.system)
        messages = [ChatMessage(role="system", content=system)] if system else []
        for message in self.messages:
            messages += message.messages()
        return ChatJob(
            job_id=job_id,
            model=self.model,
            messages=tuple(messages),
            tools=tuple(tool.spec() for tool in self.tools),
            tool_choice=self.tool_choice.written() if self.tool_choice else "auto",
            sampling=sampling,
        )


class Metadata(Body):
    """Who asks, in the client's words; accepted, and of no effect."""

    user_id: str | None = None


class MessagesBody(Conversation):
    """``POST /v1/messages``."""

    max_tokens: int
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] = Field(default_factory=list)
    metadata: Metadata | None = None

    def settings(self) -> SamplingSettings:
        """Return the settings of the wire."""
        return SamplingSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences),
        )


def text_of(blocks: Sequence[TextBlock]) -> str:
    """Return the whole text of some blocks."""
    return "".join(block.text for block in blocks)
