"""The one way into any engine, real or simulated."""

from typing import Protocol

from mixfleet_engine.request import GenerateRequest, StepOutput


class GenerationEngine(Protocol):
    """What a worker needs of an engine. Not thread-safe: one thread owns it."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together that one request may have."""
        ...

    @property
    def free_slots(self) -> int:
        """How many more requests would run at once; never negative."""
        ...

    @property
    def free_tokens(self) -> int:
        """Tokens of KV cache that nobody holds, those that are only remembered included."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would do anything."""
        ...

    def submit(self, request: GenerateRequest) -> None:
        """Queue ``request``; it joins at the next step that has room and no better use for it.

        Raises:
            RequestRejectedError: It can never run here. Nothing was queued.
        """
        ...

    def abort(self, request_id: str) -> bool:
        """Forget a request and free all it holds; whether there was one."""
        ...

    def step(self) -> list[StepOutput]:
        """Run one forward pass over everything that is ready; the new tokens and ends of answers.

        Requests that are past their deadlines end here.
        """
        ...
