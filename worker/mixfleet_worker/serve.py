"""One worker process from its start to its end."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING

from mixfleet_broker.connection import connect
from mixfleet_broker.inquiries import InquiryBox
from mixfleet_broker.queue import JobQueue
from mixfleet_broker.redis_url import safe_redis_url
from mixfleet_broker.registry import Registration, WorkerRecord
from mixfleet_engine.chat_format import ChatFormat, chat_format, default_format
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.door import GenerationEngine
from mixfleet_engine.generation import SamplingDefaults, sampling_defaults
from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_engine.tokenizer import Tokenizer
from mixfleet_worker.answering import AnswerSetup
from mixfleet_worker.broker_check import check_broker
from mixfleet_worker.config import WorkerConfig
from mixfleet_worker.group import GroupLostError
from mixfleet_worker.handoff import Mailboxes
from mixfleet_worker.inquiries import answered_inquiries
from mixfleet_worker.intake import Intake
from mixfleet_worker.io import BELL_WAIT_S, BrokerIO
from mixfleet_worker.loop import WorkerLoop
from mixfleet_worker.publisher import Publisher
from mixfleet_worker.session import QueueSession
from mixfleet_worker.tracing import run_traces

if TYPE_CHECKING:
    from mixfleet_engine.ranks import Ranks  # which imports torch

logger = logging.getLogger(__name__)

START_PATIENCE_S = 60.0
"""How long a starting worker waits for Redis."""
IO_PATIENCE_S = 0.2
"""How long one call waits for Redis later on; the I/O thread has its own way to wait."""
SIMULATED_BATCH_SIZE = 8
"""Jobs at once when no setting says how many: a simulated engine has no memory to plan."""
LOAD_LOG_S = 5.0
"""A long load says so often how far it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """All that turns a conversation into an answer."""

    engine: GenerationEngine
    tokenizer: Tokenizer
    chat_format: ChatFormat
    defaults: SamplingDefaults


def serve(
    config: WorkerConfig,
    engine: EngineConfig,
    redis_url: str,
    *,
    parent_pid: int | None = None,
    ranks: "Ranks | None" = None,
) -> None:
    """Load the model, take jobs and answer them until SIGTERM or SIGINT, then drain.

    Args:
        config: The worker's settings.
        engine: The engine's settings.
        redis_url: The broker.
        parent_pid: End when this process is not the parent any more; None: live on.
        ranks: Who shares the model with this process, which is the first of them; None: nobody.

    Raises:
        BrokerUnavailableError: No Redis answers at the start.
        ConfigError: The Redis would lose or drop jobs, see :mod:`mixfleet_broker.server_check`.
        EngineError: The model cannot be loaded.
        EngineBrokenError: The engine failed and stays broken.
    """
    started_at = time.time()
    logger.info("worker starting worker_id=%s model=%s", config.worker_id, config.model)
    with _stage(f"broker {safe_redis_url(redis_url)}"):
        check_broker(redis_url, patience_s=START_PATIENCE_S)
        # Before the load, which may take minutes: from here on an outage is sat out.
        redis = connect(redis_url, patience_s=IO_PATIENCE_S, max_block_s=BELL_WAIT_S)
    with redis:
        model = load_model(config, engine, ranks)
        record = WorkerRecord.of_this_process(
            worker_id=config.worker_id,
            model=config.model,
            max_batch_size=model.engine.free_slots,  # nobody has one yet
            context_length=model.engine.context_length,
            started_at=started_at,
        )
        queue = JobQueue(redis, config.model, config.rules, prefix=config.key_prefix)
        registration = Registration(
            redis, record, lease_s=config.rules.lease_s, prefix=config.key_prefix
        )
        session = QueueSession(queue=queue, registration=registration)
        with answered_inquiries(
            InquiryBox(redis, config.model, prefix=config.key_prefix),
            _answer_setup(config, model),
            worker_id=config.worker_id,
            lease_s=config.rules.lease_s,
        ):
            _run(config, model, session, parent_pid)
    logger.info("worker ended worker_id=%s", config.worker_id)


def _answer_setup(config: WorkerConfig, model: ServedModel) -> AnswerSetup:
    return AnswerSetup(
        model=config.model,
        model_path=None if config.model_path is None else str(config.model_path),
        chat_format=model.chat_format.name,
        context_length=model.engine.context_length,
    )


def serve_as_rank(
    config: WorkerConfig,
    engine: EngineConfig,
    redis_url: str,
    rendezvous: Rendezvous,
    *,
    parent_pid: int | None = None,
) -> None:
    """Do what :func:`serve` does, as one of several processes that share the model.

    Only rank 0 talks to Redis and stops at a signal; the others run its plans until it ends.

    Raises:
        GroupLostError: Another rank is gone.
        StartHangError: Another rank makes no progress in its start.
        EngineError: See :func:`serve`, as for all others.
    """
    # Imported here: torch takes seconds.
    from mixfleet_engine.parallel import TensorParallel
    from mixfleet_engine.ranks import RanksLostError

    try:
        with TensorParallel.connect(rendezvous, engine.device) as ranks:
            own = replace(engine, device=ranks.device)
            if ranks.shard.rank == 0:
                serve(config, own, redis_url, parent_pid=parent_pid, ranks=ranks)
            else:
                _follow(config, own, ranks)
    except RanksLostError as error:
        raise GroupLostError(str(error)) from error


def _follow(config: WorkerConfig, engine: EngineConfig, ranks: "Ranks") -> None:
    from mixfleet_engine.loading import load_runner
    from mixfleet_engine.rank_runner import follow

    assert config.model_path is not None
    runner = load_runner(config.model_path, engine, ranks=ranks)
    # A signal may come to all processes at once, and rank 0 still has answers to finish.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    follow(runner, ranks)


def load_model(
    config: WorkerConfig, engine: EngineConfig, ranks: "Ranks | None" = None
) -> ServedModel:
    """Load what ``config`` says, with a log line per stage."""
    if config.model_path is None:
        return _simulated_model(config, engine)
    # Imported here: torch takes seconds, and a simulated engine needs none of this.
    from mixfleet_engine.loading import load_engine
    from mixfleet_engine.tokenizer import load_tokenizer

    with _stage(f"tokenizer {config.model_path}"):
        tokenizer = load_tokenizer(config.model_path)
        name = config.chat_format or default_format(tokenizer, config.model_path)
        found = chat_format(name, tokenizer)
    logger.info("chat format %s", name)
    with _stage("weights"):
        loaded = load_engine(config.model_path, engine, _progress_log(), ranks, tokenizer)
    return ServedModel(
        engine=loaded,
        tokenizer=tokenizer,
        chat_format=found,
        defaults=sampling_defaults(config.model_path),
    )


def _simulated_model(config: WorkerConfig, engine: EngineConfig) -> ServedModel:
    from mixfleet_engine.simulated import SimulatedEngine
    from mixfleet_worker.simulated_words import SimulatedWords

    words = SimulatedWords()
    logger.warning("simulated engine: answers are random words, no model is loaded")
    simulated = SimulatedEngine(
        token_ids=words.word_ids,
        tokenizer=words,
        vocab_size=words.vocab_size,
        context_length=engine.context_length or 4096,
        max_batch_size=engine.max_batch_size or min(SIMULATED_BATCH_SIZE, engine.max_step_tokens),
        max_step_tokens=engine.max_step_tokens,
        answer_lengths=range(20, 61),
        step_s=config.simulated_step_s,
    )
    name = config.chat_format or default_format(words)
    return ServedModel(
        engine=simulated,
        tokenizer=words,
        chat_format=chat_format(name, words),
        defaults=SamplingDefaults(),
    )


def _run(
    config: WorkerConfig, model: ServedModel, session: QueueSession, parent_pid: int | None
) -> None:
    mailboxes = Mailboxes()
    loop = WorkerLoop(
        intake=Intake(
            model=config.model,
            tokenizer=model.tokenizer,
            chat_format=model.chat_format,
            context_length=model.engine.context_length,
            defaults=model.defaults,
        ),
        engine=model.engine,
        publisher=Publisher(),
        mailboxes=mailboxes,
        worker_id=config.worker_id,
        drain_s=config.drain_s,
        abandoned=lambda: parent_pid is not None and os.getppid() != parent_pid,
    )
    io = BrokerIO(
        session=session,
        mailboxes=mailboxes,
        worker_id=config.worker_id,
        lease_s=config.rules.lease_s,
        stall_s=config.stall_s,
        on_end=run_traces(config.model, config.worker_id),
    )
    # A daemon, so that a Redis that swallows its last words cannot keep the process alive.
    thread = threading.Thread(target=io.run, name="broker-io", daemon=True)
    with _stopped_by_signals(loop.stop):
        thread.start()
        logger.info("worker ready worker_id=%s model=%s", config.worker_id, config.model)
        try:
            loop.run()
        finally:
            thread.join(timeout=config.rules.lease_s)


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` on SIGTERM and SIGINT; afterwards they do nothing, the end is near anyway."""

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signal's own form
        stop()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _stage(what: str) -> Iterator[None]:
    """Log one line when a stage of the start is done, with its time."""
    begun = time.monotonic()
    yield
    logger.info("%s: ready in %.2f s", what, time.monotonic() - begun)


def _progress_log() -> Callable[[int, int], None]:
    """Return a callback for loading that logs every few seconds."""
    next_at = time.monotonic() + LOAD_LOG_S

    def report(done: int, total: int) -> None:
        nonlocal next_at
        if (now := time.monotonic()) >= next_at:
            next_at = now + LOAD_LOG_S
            logger.info("weights: %d of %d MiB", done >> 20, total >> 20)

    return report
