"""The engine itself: plan, launch, read, commit.

Pipelined, it reads a step's tokens only when the next step has been launched, so that the host's
work hides behind the device's::

    device    | step 1       | step 2       | step 3       |
    host      plan 1, 2      commit 1       commit 2
                             plan 3         plan 4
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mixfleet_engine.errors import ConfigError
from mixfleet_engine.launch import Launch
from mixfleet_engine.request import GenerateRequest, StepOutput
from mixfleet_engine.scheduler import Scheduler
from mixfleet_engine.step import StepPlan


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

    def launch(self, plan: StepPlan) -> Launch:
        """Clear the blocks that the plan names, write the keys and values of all chunks, sample.

        Better than to do all that is to begin it and to return, but launches must take effect in
        order. An unread token is one of those that the launch before this one samples. What the
        host knows of a chunk, its history and its grammar, must be looked at before this returns.

        Running the same chunk twice must do no harm: after an error the step may come again.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Running:
    """A step whose tokens nobody has read."""

    plan: StepPlan
    launch: Launch
    planned_at: float


class Engine:
    """Implements :class:`~mixfleet_engine.door.GenerationEngine` with a runner and a scheduler.

    Not thread-safe: one thread owns it. When the runner raises, the error leaves :meth:`step` and
    no answer has moved: every request is still there with the tokens it had. The caller may call
    :meth:`step` again, or abort some or all of the requests and go on with the others.

    Args:
        runner: Computes.
        scheduler: Decides what.
        clock: Seconds; deadlines are on this clock, and steps are timed with it.
        pipelined: Whether a step may be launched before the tokens of the one before are read. The
            tokens are the same either way. It pays where ``launch`` does not wait.

    Raises:
        ConfigError: The scheduler counts on another KV cache than the runner has.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float] = time.monotonic,
        pipelined: bool = False,
    ) -> None:
        for name in ("num_blocks", "block_size"):
            has, counts_on = getattr(runner, name), getattr(scheduler, name)
            if has != counts_on:
                raise ConfigError(f"{name}={counts_on}: the runner has {has}")
        self._runner = runner
        self._scheduler = scheduler
        self._clock = clock
        self._pipelined = pipelined
        self._running: deque[_Running] = deque()
        self._read_at = 0.0
        """When the last tokens came."""

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
        """Whether :meth:`step` would do anything, if only to read what nobody waits for."""
        return self._scheduler.has_work or bool(self._running)

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
        if not self.has_work:
            return []
        now = self._clock()
        try:
            if not self._running:
                plan = self._scheduler.plan(now)
                if not plan.chunks:
                    return self._scheduler.commit(plan, [])
                self._launch(plan, now)
            if self._pipelined and (ahead := self._scheduler.plan_ahead(now)) is not None:
                self._launch(ahead, now)
            return self._commit_oldest()
        except BaseException:
            # The scheduler will plan anew from what is committed.
            self._running.clear()
            raise

    def _launch(self, plan: StepPlan, now: float) -> None:
        self._running.append(_Running(plan, self._runner.launch(plan), now))

    def _commit_oldest(self) -> list[StepOutput]:
        oldest = self._running[0]
        sampled = oldest.launch.read()
        self._running.popleft()
        # A step begins when it is planned or when the one before ends, whichever comes last.
        began_at, self._read_at = max(oldest.planned_at, self._read_at), self._clock()
        return self._scheduler.commit(oldest.plan, sampled, elapsed_s=self._read_at - began_at)
