"""Jobs on their way into the queues: those that come while others are under way go together.

One job costs several switches between threads and a round trip, a good part of what a stream costs
to begin. Where hundreds begin in a second they share it. A job that comes alone goes at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from mixfleet_broker.submitting_together import Outcome, Submission

MAX_TOGETHER: Final = 64
"""Few enough that Redis serves others in between."""
NUM_UNDER_WAY: Final = 2
"""Round trips at a time: one job that has to wait holds up half of the others at most."""


class Submitter:
    """Queues jobs for the requests of one event loop.

    Args:
        send: Queues jobs elsewhere than in the event loop and returns the outcome of each.
    """

    def __init__(self, send: Callable[[Sequence[Submission]], Awaitable[list[Outcome]]]) -> None:
        self._send = send
        self._waiting: list[tuple[Submission, asyncio.Future[int]]] = []
        self._under_way: set[asyncio.Task[None]] = set()

    async def submit(self, submission: Submission) -> int:
        """Queue a job and return how many are before it; raises what ``JobQueue.submit`` does.

        A job whose caller is cancelled before it is sent is not sent.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((submission, done))
        if len(self._under_way) < NUM_UNDER_WAY:
            task = asyncio.create_task(self._send_all())
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        return await done

    async def _send_all(self) -> None:
        while self._waiting:
            batch = [one for one in self._waiting[:MAX_TOGETHER] if not one[1].done()]
            del self._waiting[:MAX_TOGETHER]
            if batch:
                await self._send_batch(batch)

    async def _send_batch(self, batch: list[tuple[Submission, "asyncio.Future[int]"]]) -> None:
        outcomes: Sequence[int | Exception]
        try:
            outcomes = await self._send([submission for submission, _ in batch])
        except asyncio.CancelledError:  # the gateway ends
            for _, done in batch:
                done.cancel()
            raise
        except Exception as error:  # whatever it is, each of them waits for it
            outcomes = [error] * len(batch)
        for (_, done), outcome in zip(batch, outcomes, strict=True):
            if done.done():
                continue
            if isinstance(outcome, Exception):
                done.set_exception(outcome)
            else:
                done.set_result(outcome)
