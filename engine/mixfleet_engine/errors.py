"""What the engine raises.

::

    EngineError
    ├── ConfigError             a setting or a model's own config cannot be used
    ├── CheckpointError         a file of the checkpoint is missing, broken or of the wrong shape
    ├── OutOfBlocksError        the KV cache has too few free blocks; nothing was taken
    └── RequestRejectedError    this one request cannot run; the others go on
        ├── InvalidRequestError     a field of the request cannot be used
        ├── InvalidMessagesError    the conversation does not fit the chat format
        └── PromptTooLongError      the prompt and its answer do not fit the context
"""

from typing import ClassVar


class EngineError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(EngineError):
    """A setting or a model's config cannot be used; the text names it and its value."""


class CheckpointError(EngineError):
    """A file of the checkpoint is missing, broken or of the wrong shape; the text names it."""


class OutOfBlocksError(EngineError):
    """Fewer KV blocks are free than were asked for. Nothing was taken."""

    def __init__(self, *, asked: int, free: int) -> None:
        super().__init__(f"asked for {asked} KV blocks, {free} are free")
        self.asked = asked
        self.free = free


class RequestRejectedError(EngineError):
    """One request cannot run. It hurts no other; the caller tells whoever asked."""

    code: ClassVar[str] = "rejected"
    """Stable name on the wire."""


class InvalidRequestError(RequestRejectedError):
    """A field of the request cannot be used; the text names it and its value."""

    code: ClassVar[str] = "invalid_request"


class InvalidMessagesError(RequestRejectedError):
    """The conversation does not fit the chat format; the text says which message and why."""

    code: ClassVar[str] = "invalid_messages"


class PromptTooLongError(RequestRejectedError):
    """The prompt and its answer do not fit the model's context, or the whole KV cache."""

    code: ClassVar[str] = "prompt_too_long"

    def __init__(self, *, prompt_tokens: int, max_tokens: int, context_length: int) -> None:
        super().__init__(
            f"prompt of {prompt_tokens} tokens + max_tokens {max_tokens} "
            f"exceeds the context of {context_length} tokens"
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_length = context_length
