"""A whole worker on a real Redis, in two threads, whose engine says what a test tells it to."""

import threading
from types import TracebackType
from typing import Self

from mixfleet_broker.connection import connect
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_broker.terms import QueueRules
from mixfleet_engine.chat_format import chat_format
from mixfleet_engine.generation import SamplingDefaults
from mixfleet_engine.tokenizer import Tokenizer
from mixfleet_worker.handoff import Mailboxes
from mixfleet_worker.intake import Intake
from mixfleet_worker.io import BELL_WAIT_S, BrokerIO
from mixfleet_worker.loop import WorkerLoop
from mixfleet_worker.publisher import Publisher
from mixfleet_worker.session import QueueSession
from support.scripted_engine import ScriptedEngine
from support.worker_jobs import MODEL

LEASE_S = 15.0
END_LIMIT_S = 20.0


class ScriptedWorker:
    """Serves the jobs of ``MODEL`` until the block ends; what is in flight then goes back."""

    def __init__(
        self,
        url: str,
        worker_id: str,
        engine: ScriptedEngine,
        tokenizer: Tokenizer,
        format_name: str,
    ) -> None:
        self.engine = engine
        self._redis = connect(url, max_block_s=BELL_WAIT_S)
        queue = JobQueue(self._redis, MODEL, QueueRules(lease_s=LEASE_S))
        record = WorkerRecord.of_this_process(
            worker_id=worker_id,
            model=MODEL,
            max_batch_size=1,
            context_length=engine.context_length,
            started_at=0.0,
        )
        registration = Registration(self._redis, record, lease_s=LEASE_S)
        mailboxes = Mailboxes()
        self._loop = WorkerLoop(
            intake=Intake(
                model=MODEL,
                tokenizer=tokenizer,
                chat_format=chat_format(format_name, tokenizer),
                context_length=engine.context_length,
                defaults=SamplingDefaults(),
            ),
            engine=engine,
            publisher=Publisher(),
            mailboxes=mailboxes,
            worker_id=worker_id,
            drain_s=0.0,
        )
        io = BrokerIO(
            session=QueueSession(queue=queue, registration=registration),
            mailboxes=mailboxes,
            worker_id=worker_id,
            lease_s=LEASE_S,
            stall_s=LEASE_S,
        )
        self._threads = [
            threading.Thread(target=self._loop.run, name=f"{worker_id}-loop"),
            threading.Thread(target=io.run, name=f"{worker_id}-io"),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.stop()
        for thread in self._threads:
            thread.join(END_LIMIT_S)
            assert not thread.is_alive(), thread.name
        self._redis.close()
