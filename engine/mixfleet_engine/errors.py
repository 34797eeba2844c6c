"""What the engine raises.

::

    EngineError
    ├── ConfigError             a setting or a model's own config cannot be used
    │   └── DoesNotFitError         the memory is too small for the model; nothing was loaded
    ├── CheckpointError         a file of the checkpoint is missing, broken or of the wrong shape
    ├── AnswerFailedError       the model's numbers for an answer were not finite
    ├── NativeUnavailableError  the compiled CPU back-end cannot be had on this machine
    ├── OutOfBlocksError        the KV cache has too few free blocks; nothing was taken
    ├── StartHangError          a rank of a group makes no progress in its start
    └── RequestRejectedError    this one request cannot run; the others go on
        ├── InvalidRequestError     a field of the request cannot be used
        ├── InvalidMessagesError    the conversation does not fit the chat format
        └── PromptTooLongError      the prompt and its answer do not fit the context
"""

from typing import ClassVar

_GIB = 1 << 30


class EngineError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(EngineError):
    """A setting or a model's config cannot be used; the text names it and its value."""


class DoesNotFitError(ConfigError):
    """The memory is too small for the model, found before anything is loaded.

    ``needed_bytes`` and ``available_bytes`` are of one device; ``nearest`` says in words what
    would fit, None: nothing known does.
    """

    def __init__(
        self, what: str, *, needed_bytes: int, available_bytes: int, nearest: str | None
    ) -> None:
        hint = f"; {nearest}" if nearest else ""
        super().__init__(
            f"{what}: {needed_bytes / _GIB:.2f} GiB needed, "
            f"{available_bytes / _GIB:.2f} GiB available{hint}"
        )
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.nearest = nearest


class CheckpointError(EngineError):
    """A file of the checkpoint is missing, broken or of the wrong shape; the text names it."""


class AnswerFailedError(EngineError):
    """The model's numbers for an answer were not finite, so it cannot go on."""


class NativeUnavailableError(EngineError):
    """The compiled CPU back-end cannot be had on this machine; the text is the reason."""


class OutOfBlocksError(EngineError):
    """Fewer KV blocks are free than were asked for. Nothing was taken."""

    def __init__(self, *, asked: int, free: int) -> None:
        super().__init__(f"asked for {asked} KV blocks, {free} are free")
        self.asked = asked
        self.free = free


class StartHangError(EngineError):
    """A rank makes no progress in its start; the text names it, its stage and the patience."""


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
