"""Chat with a fleet: ``from mixfleet import Client``.

The names are imported when they are first used, so that ``mixfleet --help`` does not wait for
Redis's client.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixfleet.errors import MixfleetError
    from mixfleet.fleet import Client
    from mixfleet.stream import ChatResult, ChatStream
    from mixfleet_broker.messages import (
        ChatMessage,
        JobEnd,
        JobEvent,
        Requeued,
        RunStarted,
        TokenChunk,
        TokenLogprob,
        ToolCall,
        Usage,
        new_job_id,
    )
    from mixfleet_broker.records import JobInfo

__all__ = [
    "ChatMessage",
    "ChatResult",
    "ChatStream",
    "Client",
    "JobEnd",
    "JobEvent",
    "JobInfo",
    "MixfleetError",
    "Requeued",
    "RunStarted",
    "TokenChunk",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "new_job_id",
]


def __getattr__(name: str) -> Any:
    """Import a public name; all the errors are in ``mixfleet.errors``."""
    homes = {
        "ChatResult": "mixfleet.stream",
        "ChatStream": "mixfleet.stream",
        "Client": "mixfleet.fleet",
        "JobInfo": "mixfleet_broker.records",
        "MixfleetError": "mixfleet_broker.errors",
    }
    if name not in __all__:
        raise AttributeError(f"module 'mixfleet' has no attribute {name!r}")
    home = importlib.import_module(homes.get(name, "mixfleet_broker.messages"))
    return getattr(home, name)


def __dir__() -> list[str]:
    """List the public names for tab completion, imported or not."""
    return sorted({*globals(), *__all__})
