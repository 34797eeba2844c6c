"""The body of OpenAI's older completion requests, and what its prompts may be."""

from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from mixfleet_broker.gateway.api_errors import ApiError
from mixfleet_broker.gateway.openai_schema import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    Sampling,
    unsupported,
)

Prompt = str | tuple[int, ...]


class CompletionBody(Sampling):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    # 16 is OpenAI's own default here; its chat completions have none. An explicit null lets the
    # answer run to the end of the context, as vLLM has it.
    max_tokens: int | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_of_four_forms(cls, prompt: Any) -> Any:
        # pydantic would list what is wrong with each of the four forms in turn.
        if isinstance(prompt, str) or _are(prompt, str) or _is_tokens(prompt):
            return prompt
        if isinstance(prompt, list) and prompt and all(map(_is_tokens, prompt)):
            return prompt
        raise PydanticCustomError(
            "prompt_form",
            "must be a text, token ids, or a list of texts or of lists of token ids, none empty",
        )

    def prompts(self) -> list[Prompt]:
        """Return each of the prompts."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [tuple(given)]
        return [item if isinstance(item, str) else tuple(item) for item in given]

    def num_choices(self) -> int:
        """Return how many choices the answer has: ``n`` for each prompt.

        Raises:
            ApiError: They are too many.
        """
        num_prompts, n = len(self.prompts()), self.n or 1
        if num_prompts * n > MAX_CHOICES:
            raise ApiError(
                400,
                f"prompt: {num_prompts} prompts with {n} choices each are {num_prompts * n} "
                f"choices, at most {MAX_CHOICES} go in one request",
                code="invalid_value",
                param="prompt",
                details={"choices": num_prompts * n, "limit": MAX_CHOICES},
            )
        return num_prompts * n

    def check(self) -> None:
        """Refuse what is known and cannot be had.

        Raises:
            ApiError: It names the parameter.
        """
        if self.suffix:
            raise unsupported("suffix", "the model cannot fill in before a given end")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise unsupported(
                "best_of", f"is {self.best_of}, must be n={self.n or 1}: all choices are returned"
            )
        if self.echo and self.logprobs is not None:
            raise unsupported("echo", "cannot be had with logprobs: a prompt's own are not known")
        if self.echo and not all(isinstance(prompt, str) for prompt in self.prompts()):
            raise unsupported("echo", "needs prompts of text, not of token ids")


def _are(value: Any, kind: type) -> bool:
    # By its exact type: to Python, true is a number.
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)


def _is_tokens(value: Any) -> bool:
    return _are(value, int)
