"""What a worker says of texts, chats, tokens and jobs, without Redis and without an engine."""

import pickle
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixfleet_broker.errors import (
    EngineFailedError,
    InvalidMessagesError,
    InvalidRequestError,
    JobError,
    PromptTooLongError,
)
from mixfleet_broker.inquiry_codec import (
    MAX_INQUIRY_BYTES,
    CheckJob,
    Detokenize,
    Inquiry,
    InquiryAnswer,
    TokenizeChat,
    TokenizeText,
    decode_answer,
    encode_inquiry,
)
from mixfleet_broker.job_codec import decode_job
from mixfleet_engine.chat_format import chat_format, default_format
from mixfleet_engine.errors import CheckpointError
from mixfleet_engine.generation import SamplingDefaults
from mixfleet_engine.tokenizer import Tokenizer, load_tokenizer
from mixfleet_engine.vocabulary import SPACE
from mixfleet_worker.answer_process import AnswerProcess
from mixfleet_worker.answering import Answerer, AnswerSetup, serve_socket
from mixfleet_worker.frames import receive_frame, send_frame
from mixfleet_worker.intake import Intake
from support.byte_tokenizer import ByteTokenizer
from support.tiny_model import hf_config_json, tiny_config
from support.tokenizer_files import NASTY_TEXTS, mistral_file, write_byte_level_json
from support.worker_jobs import MODEL, a_payload, a_taken_job

CONTEXT_LENGTH = 100
BYTES = ByteTokenizer()
SIMULATED = AnswerSetup(
    model=MODEL, model_path=None, chat_format="chatml", context_length=CONTEXT_LENGTH
)


def an_intake(tokenizer: Tokenizer = BYTES) -> Intake:
    return Intake(
        model=MODEL,
        tokenizer=tokenizer,
        chat_format=chat_format(default_format(tokenizer), tokenizer),
        context_length=CONTEXT_LENGTH,
        defaults=SamplingDefaults(),
    )


def an_answerer(tokenizer: Tokenizer = BYTES) -> Answerer:
    return Answerer(
        intake=an_intake(tokenizer),
        tokenizer=tokenizer,
        vocab_size=tokenizer.vocab_size,
        context_length=CONTEXT_LENGTH,
    )


def answer(inquiry: Inquiry, tokenizer: Tokenizer = BYTES) -> InquiryAnswer:
    return decode_answer(an_answerer(tokenizer).answer(encode_inquiry(inquiry)))


def check(**job: Any) -> InquiryAnswer:
    return answer(CheckJob(payload=a_payload(**job)))


def test_a_text_becomes_tokens_with_the_beginning_of_text_before_it() -> None:
    found = answer(TokenizeText(text="Hé", detail="bytes"))
    assert found.token_ids == (BYTES.bos_id, *"Hé".encode())
    assert found.token_bytes == (b"<s>", b"H", b"\xc3", b"\xa9")
    assert (found.num_tokens, found.context_length, found.max_answer_tokens) == (4, 100, 96)


def test_a_text_alone_has_no_special_tokens() -> None:
    assert answer(TokenizeText(text="Hi", add_special_tokens=False)).token_ids == tuple(b"Hi")
    assert answer(TokenizeText(text="", add_special_tokens=False)).num_tokens == 0


def test_a_count_is_only_a_number() -> None:
    found = answer(TokenizeText(text="x" * 300, detail="count"))
    assert (found.num_tokens, found.max_answer_tokens) == (301, 0)
    assert (found.token_ids, found.token_bytes) == ((), ())


def test_the_tokens_of_a_chat_are_those_that_the_engine_gets() -> None:
    payload = a_payload(question="Hi", max_tokens=5)
    admitted = an_intake().admit(a_taken_job(payload))
    found = answer(TokenizeChat(job=decode_job(payload)))
    assert found.token_ids == admitted.request.prompt_token_ids  # type: ignore[union-attr]


def test_a_chat_that_is_too_long_to_be_answered_is_counted_all_the_same() -> None:
    job = decode_job(a_payload(question="x" * 500, max_tokens=99))
    assert answer(TokenizeChat(job=job, detail="count")).num_tokens > 500


@pytest.mark.parametrize("version", ["v1", "v3"])
@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_text_comes_back_from_its_tokens(text: str, version: str) -> None:
    tokenizer = load_tokenizer(mistral_file(version))
    ids = answer(TokenizeText(text=text), tokenizer).token_ids
    assert list(ids[1:]) == tokenizer.encode(text)
    assert answer(Detokenize(token_ids=ids), tokenizer).text == text.replace(SPACE, " ")


def test_a_token_out_of_the_vocabulary_is_refused_with_its_number() -> None:
    with pytest.raises(
        InvalidRequestError, match=r"token_ids\[1\]=262: token ids go from 0 to 261"
    ):
        answer(Detokenize(token_ids=(65, 262)))


def test_a_good_job_is_answered_with_its_size() -> None:
    found = check(prompt="x" * 29, max_tokens=10)
    assert (found.num_tokens, found.context_length, found.max_answer_tokens) == (30, 100, 10)
    assert check(prompt="x" * 29).max_answer_tokens == 70


@pytest.mark.parametrize(
    ("job", "kind", "text"),
    [
        ({"prompt": "x" * 100}, PromptTooLongError, "101 tokens"),
        ({"prompt": "x" * 50, "max_tokens": 60}, PromptTooLongError, "51 tokens.*max_tokens 60"),
        ({"model": "huge"}, InvalidRequestError, "'huge'"),
    ],
)
def test_a_bad_job_is_refused_as_the_worker_would_refuse_it(
    job: dict[str, Any], kind: type[JobError], text: str
) -> None:
    with pytest.raises(kind, match=text):
        check(**job)


def test_bytes_that_are_no_job_are_refused_as_the_worker_would() -> None:
    with pytest.raises(InvalidRequestError, match="not msgpack"):
        answer(CheckJob(payload=b"\xc1 no job"))


def test_a_conversation_that_no_format_takes_is_refused() -> None:
    tokenizer = load_tokenizer(mistral_file("v1"))
    with pytest.raises(InvalidMessagesError):
        answer(CheckJob(payload=a_payload(role="assistant")), tokenizer)


@pytest.mark.parametrize("body", [b"", b"\xc1", pickle.dumps(1), b"\x91" * 1000])
def test_what_is_no_question_gets_a_refusal(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        decode_answer(an_answerer().answer(body))


def test_a_surprise_is_a_refusal_that_quotes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            raise RuntimeError(text)

    with pytest.raises(EngineFailedError, match=r"^RuntimeError$"):
        answer(TokenizeText(text="secret"), Broken())
    assert "secret" not in caplog.messages[0]


def test_a_socket_is_served_until_the_other_side_is_gone() -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve_socket, args=(theirs, an_answerer()))
    thread.start()
    with ours, theirs:
        for text in ("a", "b" * 100_000):
            send_frame(ours, encode_inquiry(TokenizeText(text=text, detail="count")))
            assert decode_answer(receive_frame(ours)).num_tokens == 1 + len(text)
        ours.close()
        thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    import json

    (tmp_path / "config.json").write_text(json.dumps(hf_config_json(tiny_config())))
    write_byte_level_json(tmp_path)
    return tmp_path


def test_a_process_answers_with_the_checkpoints_tokenizer(checkpoint: Path) -> None:
    process = AnswerProcess(replace(SIMULATED, model_path=str(checkpoint)))
    assert process.pid is None
    try:
        body = encode_inquiry(TokenizeText(text="the quick fox", add_special_tokens=False))
        found = decode_answer(process.answer(body))
        assert list(found.token_ids) == load_tokenizer(checkpoint).encode("the quick fox")
        # The model has rows for more tokens than its tokenizer; they are of the vocabulary too.
        assert (
            decode_answer(process.answer(encode_inquiry(Detokenize(token_ids=(511,))))).text == ""
        )
        with pytest.raises(InvalidRequestError, match="512"):
            decode_answer(process.answer(encode_inquiry(Detokenize(token_ids=(512,)))))
    finally:
        process.close()


def test_a_process_that_dies_costs_one_question() -> None:
    process = AnswerProcess(SIMULATED)
    body = encode_inquiry(TokenizeText(text="abc", detail="count"))
    try:
        assert decode_answer(process.answer(body)).num_tokens == 4
        first = process.pid
        assert process._process is not None
        process._process.kill()
        process._process.wait()
        with pytest.raises(EngineFailedError, match="signal 9"):
            decode_answer(process.answer(body))
        assert decode_answer(process.answer(body)).num_tokens == 4
        assert process.pid not in (None, first)
    finally:
        process.close()
    assert process.pid is None


def test_a_process_that_hangs_is_ended() -> None:
    process = AnswerProcess(SIMULATED, limit_s=0.01)  # shorter than a start
    try:
        with pytest.raises(EngineFailedError, match=r"silent for 0\.01 s"):
            decode_answer(process.answer(encode_inquiry(TokenizeText(text="abc"))))
        assert process.pid is None
    finally:
        process.close()


def test_too_many_bytes_reach_no_process() -> None:
    process = AnswerProcess(SIMULATED)
    with pytest.raises(InvalidRequestError, match=str(MAX_INQUIRY_BYTES)):
        decode_answer(process.answer(b"x" * (MAX_INQUIRY_BYTES + 1)))
    assert process.pid is None


def test_a_checkpoint_that_is_gone_is_an_error_of_the_start(tmp_path: Path) -> None:
    setup = replace(SIMULATED, model_path=str(tmp_path))
    assert AnswerSetup.from_json(setup.to_json()) == setup
    with pytest.raises(CheckpointError, match="no tokenizer here"):
        Answerer.load(setup)


def test_the_process_needs_no_torch() -> None:
    code = "import sys, mixfleet_worker.answering; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
