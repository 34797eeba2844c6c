"""Small questions to real workers, of a real tiny model and of the simulated engine."""

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from mixfleet import ChatMessage, Client
from mixfleet.errors import (
    BrokerError,
    BrokerUnavailableError,
    InquiryTimeoutError,
    InvalidRequestError,
    NoWorkerError,
    PromptTooLongError,
)
from mixfleet_broker.inquiries import ask
from mixfleet_broker.inquiry_codec import CheckJob, Detokenize, InquiryAnswer, TokenizeText
from mixfleet_broker.job_codec import encode_job
from mixfleet_broker.keys import INQUIRIES
from mixfleet_broker.messages import ChatJob, SamplingSettings
from mixfleet_engine.chat_format import Message, chat_format
from mixfleet_engine.tokenizer import load_tokenizer
from support.redis_server import RedisServer
from support.tiny_model import tiny_config, write_hf_checkpoint
from support.tokenizer_files import write_byte_level_json
from support.worker_process import WorkerProcess, until

pytestmark = pytest.mark.slow

MODEL = "simulated"
FAST = ("--simulated", "--simulated-step-s", "0")
SLOW = ("--simulated", "--simulated-step-s", "0.2", "--max-batch-size", "1")
TINY = "tiny"
CONTEXT_LENGTH = 256
TEXT = "the quick brown fox, naïve 🙂"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_hf_checkpoint(tmp_path_factory.mktemp("m") / TINY, tiny_config(vocab_size=512))
    write_byte_level_json(folder)
    return folder


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


def test_answers_are_those_of_the_engines_own_tokenizer(
    redis_url: str, redis: Redis, client: Client, checkpoint: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(checkpoint)
    form = chat_format("chatml", tokenizer)
    options = ("--context-length", str(CONTEXT_LENGTH), "--device", "cpu", "--kv-cache-gib", "0.01")
    with WorkerProcess(redis_url, "w1", tmp_path, "--model-path", checkpoint, *options):
        ids = client.tokenize(TEXT, add_special_tokens=False)
        assert list(ids) == tokenizer.encode(TEXT)
        assert client.detokenize(ids) == TEXT
        expected = form.encode([Message(role="user", content=TEXT)])
        assert client.count_tokens(TEXT) == len(expected)
        answer = client.chat(TEXT, max_tokens=2).result()
        assert answer.usage.prompt_tokens == len(expected)
        with pytest.raises(InvalidRequestError, match=r"token_ids\[1\]=512"):
            client.detokenize([5, 512])
        _check_agrees_with_the_worker(redis, client)


def _check_agrees_with_the_worker(redis: Redis, client: Client) -> None:
    """What a check says is what becomes of the job when it is sent."""
    for text, max_tokens, too_long in (
        ("x", 3, False),
        ("x" * 300, None, True),
        ("x" * 100, 200, True),
        (TEXT, None, False),
    ):
        messages = (ChatMessage(role="user", content=text),)
        sampling = SamplingSettings(max_tokens=max_tokens, temperature=0.0)
        job = ChatJob(job_id="j", model=TINY, messages=messages, sampling=sampling)
        stream = client.chat(text, max_tokens=max_tokens, temperature=0.0)
        inquiry = CheckJob(payload=encode_job(job))
        if too_long:
            with pytest.raises(PromptTooLongError) as said:
                ask(redis, TINY, inquiry)
            with pytest.raises(PromptTooLongError) as done:
                stream.result()
            assert str(said.value) == str(done.value)
            continue
        found, usage = ask(redis, TINY, inquiry), stream.result().usage
        assert usage.prompt_tokens == found.num_tokens
        assert usage.completion_tokens <= found.max_answer_tokens
        assert found.context_length == CONTEXT_LENGTH


def test_questions_are_answered_while_all_slots_are_busy(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *SLOW):
        running, waiting = client.chat("a"), client.chat("b")
        next(iter(running))
        for length in (1, 10, 100_000):
            assert len(client.tokenize("x" * length)) == 1 + length
        assert client.status(running.job_id).state == "started"
        assert client.status(waiting.job_id).state == "queued"
        waiting.cancel()
        running.cancel()


def test_poison_hurts_neither_the_worker_nor_the_next_question(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    # A number for a deadline that is far away, and an id; then bodies that are nothing.
    head = b"9999999999999" + b"0" * 32
    bodies = (b"", b"\xc1", pickle.dumps(print), b"\x91" * 100_000, b"x" * (5 << 20), b"\x81")
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST) as worker:
        assert client.count_tokens("Hi") > 0
        pid = worker.process.pid
        for poison in (b"", b"junk", b"\xff" * (5 << 20), *(head + body for body in bodies)):
            redis.rpush(INQUIRIES(MODEL), poison)
        assert client.detokenize(client.tokenize("fine")) == "fine"
        assert client.chat("Hi", max_tokens=3).result().finish_reason == "length"
        assert worker.process.poll() is None
        assert worker.process.pid == pid
        assert "inquiry dropped" in worker.log
        assert "Traceback" not in worker.log


def test_two_workers_share_the_questions(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    # They say different things, so that it shows who answered.
    short, long = ("--context-length", "100"), ("--context-length", "200")
    with (
        WorkerProcess(redis_url, "w1", tmp_path, *FAST, *short),
        WorkerProcess(redis_url, "w2", tmp_path, *FAST, *long),
    ):
        found = [ask(redis, MODEL, TokenizeText(text="x")).context_length for _ in range(8)]
        assert set(found) == {100, 200}
        assert client.num_workers(MODEL) == 2


def test_without_a_worker_the_error_comes_at_once_and_names_the_model(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST) as worker:
        assert client.count_tokens("Hi", model=MODEL) > 0
        worker.terminate()
        assert worker.exit_status() == 0
        with pytest.raises(NoWorkerError, match=MODEL):
            client.count_tokens("Hi", model=MODEL)


def test_a_worker_that_dies_with_a_question_leaves_a_typed_error_and_another_answers(
    redis_url: str, redis: Redis, tmp_path: Path
) -> None:
    with (
        WorkerProcess(redis_url, "w1", tmp_path, *FAST) as first,
        Client(redis_url, model=MODEL) as client,
    ):
        first.pause()  # it has asked Redis for the next question, and gets it
        errors: list[BrokerError] = []

        def one() -> None:
            try:
                client.tokenize("x", timeout_s=1.0)
            except BrokerError as error:
                errors.append(error)

        asking = threading.Thread(target=one)
        asking.start()
        asking.join()
        first.kill()
        assert [type(error) for error in errors] == [InquiryTimeoutError]
        with WorkerProcess(redis_url, "w2", tmp_path, *FAST):
            assert len(client.tokenize("x")) == 2
    assert redis.ping()


def test_after_an_outage_of_redis_questions_are_answered_again(tmp_path: Path) -> None:
    with (
        RedisServer("--appendonly", "yes") as server,
        WorkerProcess(server.url, "w1", tmp_path, *FAST) as worker,
        Client(server.url, model=MODEL) as client,
    ):
        assert len(client.tokenize("x")) == 2
        server.kill()
        with pytest.raises(BrokerError):
            client.tokenize("x")
        server.start()

        def answered() -> bool:
            try:
                return len(client.tokenize("x", timeout_s=1.0)) == 2
            except (BrokerUnavailableError, InquiryTimeoutError, NoWorkerError):
                return False

        until(answered, "the worker answers again")
        assert worker.process.poll() is None


def test_a_process_that_answers_ends_with_its_worker(
    redis_url: str, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST) as worker:
        assert client.count_tokens("Hi") > 0
        [child] = _children(worker.process.pid)
        worker.kill()
        until(lambda: not _is_running(child), "the process has ended too")


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] or [
        int(word)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for word in (task / "children").read_text().split()
    ]


def _is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_largest_question_has_an_answer(
    redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    with WorkerProcess(redis_url, "w1", tmp_path, *FAST):
        text = "x" * ((1 << 20) - 100)
        found: InquiryAnswer = ask(redis, MODEL, TokenizeText(text=text, detail="bytes"))
        assert found.num_tokens == len(text) + 1
        assert b"".join(found.token_bytes[1:]).decode() == text
        whole = ask(redis, MODEL, Detokenize(token_ids=found.token_ids[1:250_000]))
        assert whole.text == text[: 250_000 - 1]
        assert client.count_tokens("Hi") < 30
