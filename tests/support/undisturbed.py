"""The answers that the simulated engine gives when nothing goes wrong, without any Redis."""

from dataclasses import dataclass
from functools import cache

from mixfleet_broker.job_codec import (
    encode_job,
)
from mixfleet_broker.messages import (
    ChatJob,
    ChatMessage,
    SamplingSettings,
)
from mixfleet_broker.terms import QueueRules
from mixfleet_engine.config import EngineConfig
from mixfleet_engine.simulated import SimulatedEngine
from mixfleet_worker.config import SIMULATED_MODEL, WorkerConfig
from mixfleet_worker.intake import AdmittedJob, Intake
from mixfleet_worker.serve import ServedModel, load_model
from support.worker_jobs import a_lease, a_taken_job


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]


def undisturbed_answer(job: ChatJob) -> Answer:
    """Return what any worker answers to a job, however often its run is interrupted."""
    served = _served()
    assert isinstance(served.engine, SimulatedEngine)
    taken = a_taken_job(encode_job(job), lease=a_lease(job.job_id))
    admitted = _intake(served).admit(taken)
    assert isinstance(admitted, AdmittedJob)
    token_ids = served.engine.answer(admitted.request)
    pieces = []
    for number, token_id in enumerate(token_ids, 1):
        piece = admitted.text.push(token_id)
        pieces.append(piece.text)
        if piece.stopped:
            token_ids = token_ids[:number]
            break
    pieces.append(admitted.text.finish())
    return Answer(text="".join(pieces), token_ids=token_ids)


def undisturbed_text(question: str, max_tokens: int, *, seed: int = 1) -> str:
    """Return the answer to one question that names its seed."""
    job = ChatJob(
        job_id="undisturbed",
        model=SIMULATED_MODEL,
        messages=(ChatMessage(role="user", content=question),),
        sampling=SamplingSettings(max_tokens=max_tokens, temperature=0.0, seed=seed),
    )
    return undisturbed_answer(job).text


@cache
def _served() -> ServedModel:
    config = WorkerConfig(
        worker_id="undisturbed",
        model=SIMULATED_MODEL,
        model_path=None,
        chat_format=None,
        simulated_step_s=0.0,
        stall_s=60.0,
        drain_s=0.0,
        rules=QueueRules(),
        key_prefix="",
    )
    return load_model(config, EngineConfig())


def _intake(served: ServedModel) -> Intake:
    return Intake(
        model=SIMULATED_MODEL,
        tokenizer=served.tokenizer,
        chat_format=served.chat_format,
        context_length=served.engine.context_length,
        defaults=served.defaults,
    )
