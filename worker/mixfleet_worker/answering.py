"""Answers to small questions: a worker's tokenizer, chat format and checks, without its engine.

Run as a program it is the process that :mod:`mixfleet_worker.answer_process` starts: it reads
questions from a socket, answers them one by one, and ends with its parent.
"""

import json
import logging
import os
import signal
import socket
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Self

from mixfleet_broker.errors import EngineFailedError, MessageError
from mixfleet_broker.inquiry_codec import (
    CheckJob,
    Detail,
    Detokenize,
    Inquiry,
    InquiryAnswer,
    TokenizeText,
    decode_inquiry,
    encode_answer,
    encode_refusal,
)
from mixfleet_broker.job_codec import decode_job, encode_job
from mixfleet_broker.messages import ChatJob, SamplingSettings
from mixfleet_broker.queue import ClaimedJob, Lease
from mixfleet_engine.chat_format import chat_format, encode_prompt
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.detokenizer import Detokenizer
from mixfleet_engine.errors import InvalidRequestError, RequestRejectedError
from mixfleet_engine.generation import SamplingDefaults, sampling_defaults
from mixfleet_engine.request import GenerateRequest
from mixfleet_engine.request_check import check_request
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer
from mixfleet_worker.frames import receive_frame, send_frame
from mixfleet_worker.handoff import TakenJob
from mixfleet_worker.intake import AdmittedJob, Intake
from mixfleet_worker.simulated_words import SimulatedWords

logger = logging.getLogger(__name__)

NICENESS: Final = 5
"""Generating goes first where both want the same core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSetup:
    """What a process that answers needs to know of its worker."""

    model: str
    model_path: str | None
    """None for a simulated engine."""
    chat_format: str
    """Its name."""
    context_length: int
    """Most tokens of prompt and answer together, as the engine found it to be."""

    def to_json(self) -> str:
        """Return it as an argument of a command."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what :meth:`to_json` wrote."""
        return cls(**json.loads(text))


class Answerer:
    """Answers the bytes of one inquiry with bytes, whatever they are.

    Args:
        intake: Of the worker; it is asked what it would do with a job.
        tokenizer: The checkpoint's own.
        vocab_size: Of the model, as its engine checks token ids.
        context_length: Most tokens of prompt and answer together.
    """

    def __init__(
        self, *, intake: Intake, tokenizer: Tokenizer, vocab_size: int, context_length: int
    ) -> None:
        self._intake = intake
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._context_length = context_length

    @classmethod
    def load(cls, setup: AnswerSetup) -> Self:
        """Return one with the files of the worker's checkpoint.

        Raises:
            EngineError: They cannot be read.
        """
        if setup.model_path is None:
            tokenizer: Tokenizer = SimulatedWords()
            vocab_size, defaults = tokenizer.vocab_size, SamplingDefaults()
        else:
            path = Path(setup.model_path)
            tokenizer, defaults = load_tokenizer(path), sampling_defaults(path)
            vocab_size = ModelConfig.from_checkpoint(path).vocab_size
        intake = Intake(
            model=setup.model,
            tokenizer=tokenizer,
            chat_format=chat_format(setup.chat_format, tokenizer),
            context_length=setup.context_length,
            defaults=defaults,
        )
        return cls(
            intake=intake,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            context_length=setup.context_length,
        )

    def answer(self, body: bytes) -> bytes:
        """Return the answer to an inquiry, or why there is none."""
        try:
            return encode_answer(self._answer(decode_inquiry(body)))
        except (MessageError, RequestRejectedError) as error:
            return encode_refusal(error.code, str(error))
        except Exception as error:  # a loop top: the next question has done nothing wrong
            logger.exception("inquiry failed bytes=%d", len(body))
            return encode_refusal(EngineFailedError.code, type(error).__name__)

    def _answer(self, inquiry: Inquiry) -> InquiryAnswer:
        if isinstance(inquiry, TokenizeText):
            text = inquiry.text
            encode = self._tokenizer.encode
            ids = (
                encode_prompt(self._tokenizer, text) if inquiry.add_special_tokens else encode(text)
            )
            return self._tokens(tuple(ids), inquiry.detail)
        if isinstance(inquiry, Detokenize):
            return self._text(inquiry.token_ids)
        if isinstance(inquiry, CheckJob):
            return self._checked(inquiry.payload)
        # Neither its length nor how it is to be answered matters for what the prompt is.
        job = replace(inquiry.job, sampling=SamplingSettings(max_tokens=1), output_format=None)
        return self._tokens(self._request(job).prompt_token_ids, inquiry.detail)

    def _checked(self, payload: bytes) -> InquiryAnswer:
        request = self._request(decode_job(payload))
        check_request(request, vocab_size=self._vocab_size, context_length=self._context_length)
        answer = self._sized(len(request.prompt_token_ids))
        return replace(answer, max_answer_tokens=request.max_tokens)

    def _request(self, job: ChatJob) -> GenerateRequest:
        """Return what the engine would get if this job were claimed now, for the first time."""
        claimed = ClaimedJob(
            lease=Lease(job_id=job.job_id, token="", run=0),
            payload=encode_job(job),
            num_delivered=0,
            attempt=1,
            num_losses=0,
        )
        taken = TakenJob(claimed=claimed, delivered_token_ids=(), claimed_at=0.0)
        admitted = self._intake.admit(taken)
        assert isinstance(admitted, AdmittedJob), "a job without tokens is not complete"
        return admitted.request

    def _tokens(self, token_ids: tuple[int, ...], detail: Detail) -> InquiryAnswer:
        answer = self._sized(len(token_ids))
        if detail == "count":
            return answer
        if detail == "ids":
            return replace(answer, token_ids=token_ids)
        return replace(
            answer, token_ids=token_ids, token_bytes=tuple(map(self._spelling, token_ids))
        )

    def _spelling(self, token_id: int) -> bytes:
        if token_id in self._tokenizer.control_ids:
            return self._tokenizer.id_to_piece(token_id).encode()
        return self._tokenizer.token_bytes(token_id)

    def _text(self, token_ids: tuple[int, ...]) -> InquiryAnswer:
        for index, token_id in enumerate(token_ids):
            if token_id >= self._vocab_size:
                raise InvalidRequestError(
                    f"token_ids[{index}]={token_id}: token ids go from 0 to {self._vocab_size - 1}"
                )
        text = Detokenizer(self._tokenizer)
        pieces = [text.push(token_id) for token_id in token_ids]
        return replace(self._sized(len(token_ids)), text="".join([*pieces, text.flush()]))

    def _sized(self, num_tokens: int) -> InquiryAnswer:
        return InquiryAnswer(
            num_tokens=num_tokens,
            context_length=self._context_length,
            max_answer_tokens=max(0, self._context_length - num_tokens),
        )


def serve_socket(connection: socket.socket, answerer: Answerer) -> None:
    """Answer what comes until the other side is gone."""
    try:
        while True:
            send_frame(connection, answerer.answer(receive_frame(connection)))
    except (EOFError, OSError):
        return


def main(setup: str, descriptor: str) -> None:
    """Serve the socket that is open as ``descriptor``."""
    # A signal may come to all processes at once, and the worker says when this one is over.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    with socket.socket(fileno=int(descriptor)) as connection:
        serve_socket(connection, Answerer.load(AnswerSetup.from_json(setup)))


if __name__ == "__main__":
    main(*sys.argv[1:])
