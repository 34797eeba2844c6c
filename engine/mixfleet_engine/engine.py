"""The engine itself: plan, run, commit."""

import time
from collections.abc import Callable
from typing import Protocol

from mixfleet_engine.errors import ConfigError
from mixfleet_engine.request import GenerateRequest, StepOutput
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import SampledToken, StepPlan


class Runner(Protocol):
    """What computes a plan: the model with its weights and KV cache."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    def run(self, plan: StepPlan) -> list[SampledToken]:
        """Clear the blocks that the plan names, write the keys and values of all chunks, sample.

        Running the same chunk twice must do no harm: after an error the step may come again.

        Returns:
            One token per chunk that samples, in the plan's order; ``NO_TOKEN`` for one whose
            logits are not finite.
        """
        ...


class Engine:
    """Implements :class:`~mixfleet_engine.door.GenerationEngine` with a runner and a scheduler.

    Not thread-safe: one thread owns it. When the runner raises, the error leaves :meth:`step` and
    no answer has moved: every request is still there with the tokens it had. The caller may call
    :meth:`step` again, or abort some or all of the requests and go on with the others.

    Args:
        runner: Computes.
        scheduler: Decides what.
        clock: Seconds; deadlines are on this clock, and steps are timed with it.

    Raises:
        ConfigError: The scheduler counts on another KV cache than the runner has.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        for name in ("num_blocks", "block_size"):
            has, counts_on = getattr(runner, name), getattr(scheduler, name)
            if has != counts_on:
                raise ConfigError(f"{name}={counts_on}: the runner has {has}")
        self._runner = runner
        self._scheduler = scheduler
        self._clock = clock

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together that one request may have."""
        return self._scheduler.context_length

    @property
    def free_slots(self) -> int:
        """How many more requests would run at once; never negative."""
        return self._scheduler.free_slots

    @property
    def free_tokens(self) -> int:
        """Tokens of KV cache that nobody holds, those that the prefix cache remembers included."""
        return self._scheduler.free_tokens

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would do anything."""
        return self._scheduler.has_work

    @property
    def num_preemptions(self) -> int:
        """How often a request has lost its place in the KV cache to another one so far."""
        return self._scheduler.num_preemptions

    @property
    def num_running(self) -> int:
        """Requests that have a place in the KV cache."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for one, new or preempted."""
        return self._scheduler.num_waiting

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens that requests had each time they began to run, first or again."""
        return self._scheduler.prefix_queried_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """How many of them were in the KV cache already."""
        return self._scheduler.prefix_hit_tokens

    def submit(self, request: GenerateRequest) -> None:
        """Queue ``request``; it joins at the next step that has room and no better use for it.

        Raises:
            RequestRejectedError: It can never run here. Nothing was queued.
        """
        self._scheduler.submit(request)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free all it holds; whether there was one."""
        return self._scheduler.abort(request_id)

    def step(self) -> list[StepOutput]:
        """Run one forward pass over everything that is ready; the new tokens and ends of answers.

        Requests that are past their deadlines end here, whether anything is computed or not.
        """
        if not self._scheduler.has_work:
            return []
        started = self._clock()
        plan = self._scheduler.plan(started)
        if not plan.chunks:
            return self._scheduler.commit(plan, [])
        sampled = self._runner.run(plan)
        return self._scheduler.commit(plan, sampled, elapsed_s=self._clock() - started)
