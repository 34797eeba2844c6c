"""Jobs of many requests on their way into the queues; what sends them is played here."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from redis import Redis

from mixfleet_broker.errors import BrokerUnavailableError, MessageError
from mixfleet_broker.gateway.submitter import MAX_TOGETHER, NUM_UNDER_WAY, Submitter
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.submitting_together import Outcome, Submission
from mixfleet_broker.terms import JobTerms
from support.queue_jobs import MODEL, chat_job

LIMIT_S = 10.0


class HeldSender:
    """Notes each batch, and answers when it is let go."""

    def __init__(self, answer: Callable[[Submission], Outcome] = lambda _: 7) -> None:
        self.batches: list[Sequence[Submission]] = []
        self.go = asyncio.Event()
        self._answer = answer

    async def __call__(self, submissions: Sequence[Submission]) -> list[Outcome]:
        self.batches.append(submissions)
        await self.go.wait()
        return [self._answer(submission) for submission in submissions]


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), LIMIT_S))


def submission() -> Submission:
    queue = JobQueue(Redis(), MODEL)  # which connects to nothing before it is used
    return Submission(queue=queue, job=chat_job(), terms=JobTerms())


async def begin(submitter: Submitter, *jobs: Submission) -> list["asyncio.Task[int]"]:
    """Submit jobs in this order, and return when nothing moves any more."""
    tasks = [asyncio.create_task(submitter.submit(job)) for job in jobs]
    for _ in range(10):
        await asyncio.sleep(0)
    return tasks


def test_jobs_that_come_while_others_are_under_way_go_together() -> None:
    async def work() -> None:
        sender = HeldSender()
        submitter = Submitter(sender)
        early = [submission() for _ in range(NUM_UNDER_WAY)]
        tasks = [task for job in early for task in await begin(submitter, job)]
        assert [list(batch) for batch in sender.batches] == [[job] for job in early]
        late = [submission() for _ in range(MAX_TOGETHER + 5)]
        tasks += await begin(submitter, *late)
        assert len(sender.batches) == NUM_UNDER_WAY
        sender.go.set()
        assert set(await asyncio.gather(*tasks)) == {7}
        together = [list(batch) for batch in sender.batches[NUM_UNDER_WAY:]]
        assert together == [late[:MAX_TOGETHER], late[MAX_TOGETHER:]]

    run(work)


def test_each_job_has_its_own_outcome() -> None:
    async def work() -> None:
        bad = submission()
        sender = HeldSender(lambda one: MessageError("bad") if one is bad else 3)
        sender.go.set()
        tasks = await begin(Submitter(sender), submission(), bad, submission())
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[0] == results[2] == 3
        assert isinstance(results[1], MessageError)

    run(work)


@pytest.mark.parametrize("error", [BrokerUnavailableError("away"), RuntimeError("a defect")])
def test_what_breaks_a_round_trip_reaches_all_of_it_and_no_later_job(error: Exception) -> None:
    async def work() -> None:
        async def send(submissions: Sequence[Submission]) -> list[Outcome]:
            if len(submissions) > 1:
                raise error
            return [0]

        submitter = Submitter(send)
        tasks = await begin(submitter, submission(), submission())
        assert await asyncio.gather(*tasks, return_exceptions=True) == [error, error]
        assert await submitter.submit(submission()) == 0

    run(work)


def test_a_job_whose_caller_is_gone_before_it_is_sent_is_not_sent() -> None:
    async def work() -> None:
        sender = HeldSender()
        submitter = Submitter(sender)
        for _ in range(NUM_UNDER_WAY):
            await begin(submitter, submission())
        gone, stays = submission(), submission()
        leaving, staying = await begin(submitter, gone, stays)
        leaving.cancel()
        sender.go.set()
        assert await staying == 7
        assert [list(batch) for batch in sender.batches[NUM_UNDER_WAY:]] == [[stays]]
        assert leaving.cancelled()

    run(work)


def test_a_caller_that_goes_while_its_job_is_sent_disturbs_no_other() -> None:
    async def work() -> None:
        sender = HeldSender()
        leaving, staying = await begin(Submitter(sender), submission(), submission())
        leaving.cancel()
        await asyncio.sleep(0)
        sender.go.set()
        assert await staying == 7

    run(work)


def test_callers_do_not_wait_for_a_gateway_that_ends() -> None:
    async def work() -> None:
        async def send(_: Sequence[Submission]) -> list[Outcome]:
            raise asyncio.CancelledError  # as a pool that is shut down answers

        tasks = await begin(Submitter(send), submission(), submission())
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)

    run(work)
