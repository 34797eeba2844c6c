"""The fleet as the gateway's event loop sees it: every call of the broker on a thread of a pool.

The event loop itself never waits for Redis. Whatever the calls raise is the broker's own error.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

from mixfleet_broker.attendance import attend
from mixfleet_broker.connection import connect, find_redis_url
from mixfleet_broker.errors import BrokerError, UnknownModelError
from mixfleet_broker.gateway.cached import Cached
from mixfleet_broker.gateway.hub import Hub, Subscription
from mixfleet_broker.gateway.submitter import Submitter
from mixfleet_broker.inquiries import ask
from mixfleet_broker.inquiry_codec import Inquiry, InquiryAnswer
from mixfleet_broker.jobs import JobRow, find_job
from mixfleet_broker.messages import ChatJob
from mixfleet_broker.overview import ModelStatus, model_statuses
from mixfleet_broker.queue import CancelOutcome, JobInfo, JobQueue
from mixfleet_broker.registry import WorkerRecord, models, workers
from mixfleet_broker.settings import Settings
from mixfleet_broker.submitting_together import Outcome, Submission, submit_together
from mixfleet_broker.terms import READER_S, JobTerms, QueueRules

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS: Final = 8
"""Calls of Redis at a time; each takes well under a millisecond on a near server, and more threads
would only stand in each other's way."""
NUM_ASKERS: Final = 16
"""Questions to workers at a time; each may wait for seconds."""
FRESH_S: Final = 1.0
"""How old what is known of models and workers may be."""
_HOUSEKEEPING_S: Final = 5.0
_ATTEND_EVERY_S: Final = READER_S / 3


class Fleet:
    """One gateway's way to the queues. Made and used in one event loop; closed by :meth:`close`.

    Args:
        settings: Where Redis is, and the limits of the queues.

    Raises:
        BrokerUnavailableError: No Redis is set or running, or it does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        url = find_redis_url(settings)
        self.settings = settings
        self.prefix = settings.key_prefix
        self.rules = QueueRules.from_settings(settings)
        self._stop = threading.Event()
        # Calls for a client that waits are quick to fail; the readers of channels wait for Redis.
        self.redis = connect(url, stop=self._stop)
        self._patient = connect(url, patience_s=None, stop=self._stop)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="redis")
        self._askers = ThreadPoolExecutor(NUM_ASKERS, thread_name_prefix="ask")
        self.hub = Hub(self._patient, prefix=self.prefix)
        self._submitter = Submitter(self._submit_together)
        self._attended: set[str] = set()
        self._statuses: Cached[list[ModelStatus]] = Cached(self._read_statuses, FRESH_S)
        self._workers: Cached[list[WorkerRecord]] = Cached(self._read_workers, FRESH_S)
        self._models: Cached[list[str]] = Cached(self._read_models, FRESH_S)
        self._tasks = [
            asyncio.create_task(self._every(_HOUSEKEEPING_S, self._reap_all)),
            asyncio.create_task(self._every(_ATTEND_EVERY_S, self._attend_all)),
        ]

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``function(*args, **kwargs)``, run on a thread of the pool."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    async def with_redis(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return ``function(redis, *args, prefix=..., **kwargs)``, run on a thread of the pool."""
        return await self.call(function, self.redis, *args, prefix=self.prefix, **kwargs)

    async def ask(self, model: str, inquiry: Inquiry, timeout_s: float) -> InquiryAnswer:
        """Return what a worker of the model answers; raises as :func:`inquiries.ask` does."""
        question = partial(ask, self.redis, model, inquiry, timeout_s, prefix=self.prefix)
        return await asyncio.get_running_loop().run_in_executor(self._askers, question)

    async def submit(self, job: ChatJob, terms: JobTerms, rules: QueueRules | None = None) -> int:
        """Queue ``job`` and return how many jobs are before it; see ``JobQueue.submit``."""
        queue = self.queue(job.model, rules)
        if queue.rules.durability != "server":
            return await self.call(queue.submit, job, terms)
        return await self._submitter.submit(Submission(queue=queue, job=job, terms=terms))

    async def cancel(self, job_id: str, model: str, reason: str) -> CancelOutcome:
        """End a job wherever it is."""
        return await self.call(self.queue(model).cancel, job_id, reason)

    async def info(self, job_id: str, model: str) -> JobInfo:
        """Return where a job is; raises UnknownJobError."""
        return await self.call(self.queue(model).info, job_id)

    async def find(self, job_id: str) -> JobRow:
        """Return what is kept of a job; raises UnknownJobError."""
        return await self.with_redis(find_job, job_id)

    def follow(self, after: Mapping[str, str]) -> Subscription:
        """Return what comes on the channels of jobs; see :class:`Hub`."""
        return self.hub.follow(after)

    def attend(self, job_ids: Sequence[str]) -> None:
        """Say from now on that jobs which are to end with their readers have one."""
        self._attended.update(job_ids)

    def leave(self, job_ids: Sequence[str]) -> None:
        """Say it no more."""
        self._attended.difference_update(job_ids)

    async def models(self) -> list[str]:
        """Return the models served now or in the last days, the latest first."""
        return await self._models.get()

    async def statuses(self) -> list[ModelStatus]:
        """Return how the queue of each model stands."""
        return await self._statuses.get()

    async def workers(self) -> list[WorkerRecord]:
        """Return the live workers."""
        return await self._workers.get()

    async def check_model(self, model: str) -> str:
        """Return ``model`` if it is served now or was lately.

        Raises:
            UnknownModelError: It is not; the text names those that are.
        """
        known = await self.models()
        if model not in known:
            names = ", ".join(known) or "none is; start a worker"
            raise UnknownModelError(
                f"the model {model[:80]!r} is not served here: {names}", models=known
            )
        return model

    async def context_length(self, model: str) -> int | None:
        """Return the shortest context of the live workers of a model; None while there is none."""
        lengths = [w.context_length for w in await self.workers() if w.model == model]
        return min(lengths, default=None)

    def queue(self, model: str, rules: QueueRules | None = None) -> JobQueue:
        """Return the queue of a model."""
        return JobQueue(self.redis, model, rules or self.rules, prefix=self.prefix)

    async def close(self) -> None:
        """Let go of Redis. Jobs go on; those that end with their readers have half a minute."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._stop.set()
        self.hub.stop()
        for pool in (self._threads, self._askers):
            pool.shutdown(wait=False, cancel_futures=True)
        self.redis.close()
        self._patient.close()

    async def _submit_together(self, submissions: Sequence[Submission]) -> list[Outcome]:
        return await self.call(submit_together, self.redis, submissions)

    async def _read_models(self) -> list[str]:
        return await self.with_redis(models)

    async def _read_workers(self) -> list[WorkerRecord]:
        return await self.with_redis(workers)

    async def _read_statuses(self) -> list[ModelStatus]:
        return await self.with_redis(model_statuses)

    async def _every(self, seconds: float, work: Callable[[], Any]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except BrokerError as error:
                logger.warning("housekeeping_failed error=%s", error)

    async def _reap_all(self) -> None:
        """Look after jobs whose workers died or whose time is over, as anybody may."""
        for model in await self.models():
            await self.call(self.queue(model).reap)

    async def _attend_all(self) -> None:
        if self._attended:
            await self.with_redis(attend, sorted(self._attended))
