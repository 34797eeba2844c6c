"""AIME's endpoints: each a route, the model behind it, and the inputs that it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

DEFAULT_OUTPUTS: Final = {
    "text": "string",
    "num_generated_tokens": "integer",
    "model_name": "string",
    "max_seq_len": "integer",
    "current_context_length": "integer",
    "prompt_length": "integer",
}
DEFAULT_PROGRESS_OUTPUTS: Final = {
    "text": "string",
    "num_generated_tokens": "integer",
    "current_context_length": "integer",
}
IMPLICIT_INPUTS: Final = frozenset({"key", "client_session_auth_key", "wait_for_result"})
"""Every endpoint takes these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One parameter of an endpoint."""

    name: str
    type: str
    minimum: float | None = None
    maximum: float | None = None
    max_length: int | None = None
    """Characters of a text."""
    default: Any = None
    required: bool = False

    def description(self) -> dict[str, Any]:
        """Return what is told of it to whoever asks."""
        value: dict[str, Any] = {"type": self.type, "required": self.required}
        for name in ("minimum", "maximum", "max_length", "default"):
            if getattr(self, name) is not None:
                value[name] = getattr(self, name)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One route of AIME's interface."""

    name: str
    model: str
    """Whose queue its jobs go to."""
    title: str
    description: str = ""
    version: int = 1
    methods: tuple[str, ...] = ("GET", "POST")
    category: str = "chat"
    inputs: tuple[Input, ...]
    outputs: Mapping[str, str]
    progress_outputs: Mapping[str, str]


def inputs_of_chat() -> tuple[Input, ...]:
    """Return the inputs of AIME's own Mixtral endpoint, with its defaults."""
    return (
        Input(name="prompt_input", type="string", default=""),
        Input(name="chat_context", type="json", default=""),
        Input(name="top_k", type="integer", minimum=1, maximum=1000, default=40),
        Input(name="top_p", type="float", minimum=0.0, maximum=1.0, default=0.9),
        Input(name="temperature", type="float", minimum=0.0, maximum=1.0, default=0.8),
        Input(name="max_gen_tokens", type="integer", minimum=1, default=2000),
    )


def endpoint_of_model(model: str) -> Endpoint:
    """Return the endpoint of a model that no file describes; it is called like the model."""
    return Endpoint(
        name=model,
        model=model,
        title=model,
        inputs=inputs_of_chat(),
        outputs=DEFAULT_OUTPUTS,
        progress_outputs=DEFAULT_PROGRESS_OUTPUTS,
    )
