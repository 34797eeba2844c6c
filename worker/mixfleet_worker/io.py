"""The I/O thread: the one owner of the worker's broker session.

It claims jobs, keeps their leases, writes what the loop computed, and reaps the leases of
workers that died. All waiting for Redis happens here, so the decode never waits for it.

One turn is: hear the loop, keep the leases, write, claim; and when there is nothing at all to
do, wait for the queue's bell. The write of each step brings back what others have to say: that a
job is cancelled, or what an operator wants. While Redis is away the decode goes on and its chunks
gather here, merged to one per job, until the lease of their job must be taken for lost.
"""

import logging
import time
from collections.abc import Callable
from uuid import uuid4

from mixfleet_broker.errors import BrokerError, BrokerUnavailableError, MessageError
from mixfleet_broker.messages import (
    JobEnd,
)
from mixfleet_broker.orders import READ_YOUR_ORDER, Order, cancelled_run
from mixfleet_broker.queue import ClaimedJob
from mixfleet_worker.handoff import (
    DrainOrdered,
    EndWrite,
    IOFailed,
    IsolateJob,
    JobTimes,
    Mailboxes,
    ReleaseJob,
    StepReport,
    StopClaiming,
    TakenJob,
    ToIO,
    receive,
)
from mixfleet_worker.holdings import Holdings
from mixfleet_worker.outage import Outage
from mixfleet_worker.session import Activity, Session

logger = logging.getLogger(__name__)

BELL_WAIT_S = 1.0
"""Longest wait for the bell: what a lost ring costs."""


class BrokerIO:
    """What the I/O thread does.

    Args:
        session: The worker's connection to the broker; used by this thread only.
        mailboxes: The two queues to and from the loop.
        worker_id: For the logs.
        lease_s: How long a lease holds without renewal.
        stall_s: A loop that has not reported for so long is taken for stuck: its leases are not
            renewed and no job is claimed for it.
        clock: Monotonic seconds.
        on_end: Told of each end that was written.
    """

    def __init__(
        self,
        *,
        session: Session,
        mailboxes: Mailboxes,
        worker_id: str,
        lease_s: float,
        stall_s: float,
        clock: Callable[[], float] = time.monotonic,
        on_end: Callable[[EndWrite], None] | None = None,
    ) -> None:
        self._session = session
        self._to_loop = mailboxes.to_loop
        self._to_io = mailboxes.to_io
        self._worker_id = worker_id
        self._lease_s = lease_s
        self._stall_s = stall_s
        self._period_s = lease_s / 3
        self._clock = clock
        self._holdings = Holdings(
            session=session,
            to_loop=mailboxes.to_loop,
            worker_id=worker_id,
            lease_s=lease_s,
            clock=clock,
            on_end=on_end,
        )
        self._unread: list[ClaimedJob] = []
        self._claim_token: str | None = None
        self._num_handed_over = 0
        self._report: StepReport | None = None
        self._reported_at = clock()
        self._duties_at = clock()
        self._shown: Activity | None = None
        self._jobs_wait = True
        self._step_is_new = False
        self._claiming = True
        self._order: Order | None = None
        self._closing = False
        self._outage = Outage(worker_id=worker_id, lease_s=lease_s, clock=clock)

    def run(self) -> None:
        """Work until told to close. An error of ours is handed to the loop."""
        try:
            while not self._closing:
                self.turn()
            self._close()
        except Exception as error:  # a loop top: without this thread the worker is no worker
            logger.exception("io thread failed worker_id=%s", self._worker_id)
            self._to_loop.put(IOFailed(error))

    def turn(self) -> None:
        """Hear the loop; keep the leases, write and claim; wait for the bell if nothing is up.

        Where Redis fails the turn ends. Nothing is lost: the next one goes on from there.
        """
        self._hear(self._patience_s())
        if self._outage.pause_s > 0:
            return
        try:
            self._work()
        except BrokerError as error:
            self._sit_out(error)

    def _work(self) -> None:
        self._outage.begin_turn()
        self._keep_leases()
        self._write()
        self._claim()
        self._hand_over()
        self._show_change()
        self._outage.end_turn()
        if self._waits_in_redis:
            self._wait_idly(min(BELL_WAIT_S, self._period_s))

    @property
    def _waits_in_redis(self) -> bool:
        """Whether there is nothing to do here; else it is the loop that is waited for.

        Such as when a job was taken away and its slot is not yet free.
        """
        may_wait = self._is_paused or (self._may_claim and self._free() > 0)
        return self._is_idle and may_wait and not self._closing

    def _wait_idly(self, wait_s: float) -> None:
        session = self._session
        wait = session.wait_for_word if self._is_paused else session.wait_for_jobs
        word = wait(wait_s)
        if word == READ_YOUR_ORDER:
            self._obey_order(self._session.order())

    @property
    def _is_idle(self) -> bool:
        return not (self._holdings or self._unread)

    @property
    def _may_claim(self) -> bool:
        may = self._claiming and not self._closing and not self._is_stalled
        return may and not self._is_paused and not self._holdings.has_lone_job

    @property
    def _is_paused(self) -> bool:
        return self._claiming and self._order == "pause"

    @property
    def _is_stalled(self) -> bool:
        return self._clock() - self._reported_at > self._stall_s

    # Hearing the loop

    def _patience_s(self) -> float:
        """Return how long to wait for the loop; when idle, the bell is what is waited for."""
        if (pause_s := self._outage.pause_s) > 0:
            return pause_s
        if self._holdings.has_writes or self._waits_in_redis:
            return 0.0
        return max(0.0, self._duties_at - self._clock())

    def _hear(self, wait_s: float) -> None:
        for item in receive(self._to_io, wait_s):
            self._obey(item)

    def _obey(self, item: ToIO) -> None:
        if isinstance(item, StepReport):
            self._report = item
            self._reported_at = self._clock()
            self._step_is_new = True
            for write in item.writes:
                self._holdings.add(write)
        elif isinstance(item, ReleaseJob):
            self._holdings.let_go([item.lease])
        elif isinstance(item, IsolateJob):
            self._holdings.isolate(item.lease)
        elif isinstance(item, StopClaiming):
            self._claiming = False
        else:
            self._closing = True

    # Keeping the leases

    def _keep_leases(self) -> None:
        """Every third of a lease: renew, reap, and say that this worker lives."""
        self._holdings.release()
        now = self._clock()
        if now < self._duties_at:
            return
        if not self._is_stalled:
            self._holdings.renew_all()
        if self._outage.may_reap:
            self._reap()
        self._beat()
        self._duties_at = now + self._period_s

    def _reap(self) -> None:
        try:
            self._session.reap()
        except BrokerUnavailableError:
            raise
        except BrokerError as error:
            # Others' jobs: what is wrong with them must not stop the ones in hand.
            logger.warning("reap refused worker_id=%s: %s", self._worker_id, error)

    def _activity(self) -> Activity:
        return Activity(
            in_flight=len(self._holdings), draining=not self._claiming, paused=self._is_paused
        )

    def _beat(self) -> None:
        activity = self._activity()
        order = self._session.beat(activity)
        self._shown = activity
        self._obey_order(order)

    def _obey_order(self, order: Order | None) -> None:
        """Do what an operator wants. A drain does not turn back."""
        if order == self._order:
            return
        logger.info("order %s worker_id=%s", order or "go on", self._worker_id)
        self._order = order
        if order == "drain":
            self._to_loop.put(DrainOrdered())

    def _show_change(self) -> None:
        """Beat out of turn when the worker became busy, idle or draining."""
        if self._shown is None or self._shown.state != self._activity().state:
            self._beat()

    # Writing and claiming

    def _write(self) -> None:
        """Send what there is to write; whether jobs wait, and words for us, come back with it.

        Each step asks, also one that has nothing to write: a cancel must not wait for a long
        prefill.
        """
        ask = self._step_is_new and not self._is_idle
        flushed = self._holdings.write(ask=ask)
        if flushed is None:
            return
        self._step_is_new = False
        self._jobs_wait = flushed.num_queued > 0
        for word in flushed.words:
            self._hear_word(word)

    def _hear_word(self, word: str) -> None:
        run = cancelled_run(word)
        if run is not None:
            self._holdings.revoke(*run)
        elif word == READ_YOUR_ORDER:
            self._obey_order(self._session.order())

    def _free(self) -> int:
        """Return the slots that no job takes, those on their way to the loop counted as taken."""
        if self._report is None:
            return 0
        on_their_way = self._num_handed_over - self._report.num_taken
        return self._report.free_slots - on_their_way - len(self._unread)

    def _claim(self) -> None:
        if not self._may_claim or self._free() <= 0:
            return
        if not (self._is_idle or self._jobs_wait):
            return
        if self._claim_token is None:
            self._claim_token = uuid4().hex
        # The token is kept until a reply is seen: a repeated claim gives the same jobs.
        jobs = self._session.claim(
            self._free(), self._claim_token, idle=self._is_idle, reaps=self._outage.may_reap
        )
        self._claim_token = None
        self._jobs_wait = bool(jobs)
        for job in jobs:
            self._holdings.hold(job.lease, alone=job.alone)
            self._unread.append(job)

    def _hand_over(self) -> None:
        """Give the claimed jobs to the loop, with the tokens that their readers have."""
        while self._unread:
            job = self._unread[0]
            if self._holdings.holds(job.lease):
                self._hand_over_one(job)
            self._unread.pop(0)

    def _hand_over_one(self, job: ClaimedJob) -> None:
        delivered: tuple[int, ...] = ()
        claimed_at = self._holdings.renewed_at(job.lease)
        try:
            if job.num_delivered:
                delivered = self._session.delivered_tokens(job.lease.job_id)
        except MessageError as error:
            end = JobEnd(state="failed", code=error.code, message=str(error))
            times = JobTimes(claimed_at=claimed_at, ended_at=self._clock())
            self._holdings.add(EndWrite(lease=job.lease, end=end, times=times))
            return
        self._num_handed_over += 1
        self._to_loop.put(
            TakenJob(claimed=job, delivered_token_ids=delivered, claimed_at=claimed_at)
        )

    # Living through an outage

    def _sit_out(self, error: Exception) -> None:
        """Leave Redis alone for a moment, and give up the leases that must have ended by now."""
        self._outage.fail(error)
        self._holdings.give_up_older_than(self._clock() - self._lease_s)

    # Closing

    def _close(self) -> None:
        """Write what is left, give back what is held, sign off; Redis gets a while to be there."""
        deadline = self._clock() + self._period_s
        while True:
            try:
                self._write_rest()
                self._give_back()
                self._session.sign_off()
                return
            except BrokerError as error:
                if self._clock() > deadline:
                    logger.warning(
                        "broker away at the end, leases will be reaped worker_id=%s: %s",
                        self._worker_id,
                        error,
                    )
                    return
                self._hear(self._outage.next_backoff_s())

    def _write_rest(self) -> None:
        # A job may have several writes, which go out one by one; each round is one fewer.
        while self._holdings.has_writes:
            self._holdings.write(ask=False)

    def _give_back(self) -> None:
        if self._claim_token is not None:  # jobs may be ours without our knowing
            jobs = self._session.claim(
                1, self._claim_token, idle=self._is_idle, reaps=self._outage.may_reap
            )
            self._claim_token = None
            self._holdings.let_go([job.lease for job in jobs])
        self._holdings.let_go_all()
        self._holdings.release()
