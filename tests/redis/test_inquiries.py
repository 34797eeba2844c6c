"""Asking and answering through a real Redis, the worker's side played by the test."""

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from redis import Redis

from mixfleet_broker.errors import (
    BrokerError,
    InquiriesFullError,
    InquiryTimeoutError,
    InvalidRequestError,
    MessageError,
    NoWorkerError,
)
from mixfleet_broker.inquiries import MAX_TIMEOUT_S, MAX_WAITING, InquiryBox, ask
from mixfleet_broker.inquiry_codec import (
    InquiryAnswer,
    TokenizeText,
    decode_inquiry,
    encode_answer,
    encode_refusal,
)
from mixfleet_broker.keys import INQUIRIES, INQUIRY_ANSWER
from mixfleet_broker.registry import Registration, WorkerRecord
from support.queue_jobs import MODEL
from support.worker_process import until

QUESTION = TokenizeText(text="Hi")
ANSWER = InquiryAnswer(num_tokens=1, context_length=64, max_answer_tokens=63, token_ids=(7,))
SHORT_S = 0.05


@pytest.fixture
def registration(redis: Redis) -> Registration:
    """One live worker."""
    record = WorkerRecord.of_this_process(
        worker_id="w1", model=MODEL, max_batch_size=1, context_length=64, started_at=0.0
    )
    registration = Registration(redis, record, lease_s=15.0)
    registration.beat(state="busy", in_flight=1)
    return registration


@pytest.fixture
def box(redis: Redis, registration: Registration) -> InquiryBox:
    assert registration.record.model == MODEL
    return InquiryBox(redis, MODEL)


@contextmanager
def answering(box: InquiryBox, *answers: bytes) -> Iterator[list[str]]:
    """Give one answer after another in a thread; the ids of the questions that came."""
    ids: list[str] = []

    def work() -> None:
        for answer in answers:
            inquiry = box.wait(10.0)
            assert inquiry is not None
            assert decode_inquiry(inquiry.body) == QUESTION
            ids.append(inquiry.inquiry_id)
            box.give(inquiry.inquiry_id, answer)

    thread = threading.Thread(target=work)
    thread.start()
    yield ids
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_a_question_gets_its_own_answer(redis: Redis, box: InquiryBox) -> None:
    with answering(box, encode_answer(ANSWER)) as ids:
        assert ask(redis, MODEL, QUESTION) == ANSWER
    assert len(ids) == 1
    assert redis.exists(INQUIRIES(MODEL), INQUIRY_ANSWER(ids[0])) == 0


def test_a_refusal_is_raised(redis: Redis, box: InquiryBox) -> None:
    with (
        answering(box, encode_refusal("invalid_request", "why")),
        pytest.raises(InvalidRequestError, match="why"),
    ):
        ask(redis, MODEL, QUESTION)


def test_without_a_live_worker_the_error_comes_at_once(
    redis: Redis, registration: Registration
) -> None:
    with pytest.raises(NoWorkerError, match="other"):
        ask(redis, "other", QUESTION, MAX_TIMEOUT_S)
    registration.deregister()
    with pytest.raises(NoWorkerError, match=MODEL):
        ask(redis, MODEL, QUESTION, MAX_TIMEOUT_S)
    assert redis.exists(INQUIRIES(MODEL)) == 0


def test_a_paused_worker_answers_all_the_same(
    redis: Redis, box: InquiryBox, registration: Registration
) -> None:
    registration.beat(state="paused", in_flight=0)
    with answering(box, encode_answer(ANSWER)):
        assert ask(redis, MODEL, QUESTION) == ANSWER


def test_a_worker_that_dies_after_taking_a_question_costs_the_askers_patience(
    redis: Redis, box: InquiryBox
) -> None:
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.append(box.wait(10.0)))
    thread.start()
    with pytest.raises(InquiryTimeoutError, match=r"within 0\.5 s") as caught:
        ask(redis, MODEL, QUESTION, 0.5)
    thread.join()
    assert taken != [None]
    assert caught.value.retryable
    with answering(box, encode_answer(ANSWER)):
        assert ask(redis, MODEL, QUESTION) == ANSWER


def test_a_full_list_refuses_with_the_numbers(redis: Redis, box: InquiryBox) -> None:
    long_over = b"0" * 45
    redis.rpush(INQUIRIES(MODEL), *[long_over] * MAX_WAITING)
    with pytest.raises(InquiriesFullError) as caught:
        ask(redis, MODEL, QUESTION, 0.001)
    assert (caught.value.waiting, caught.value.limit) == (MAX_WAITING, MAX_WAITING)
    assert caught.value.retryable
    assert redis.llen(INQUIRIES(MODEL)) == MAX_WAITING
    # Nobody waits for them any more: a worker that comes back is through with them at once.
    assert [box.wait(SHORT_S) for _ in range(MAX_WAITING)] == [None] * MAX_WAITING
    assert redis.llen(INQUIRIES(MODEL)) == 0
    with answering(box, encode_answer(ANSWER)):
        assert ask(redis, MODEL, QUESTION) == ANSWER


def test_what_is_left_behind_goes_away_by_itself(redis: Redis, box: InquiryBox) -> None:
    with pytest.raises(InquiryTimeoutError):
        ask(redis, MODEL, QUESTION, SHORT_S)
    assert 0 < redis.pttl(INQUIRIES(MODEL)) <= 1000 * MAX_TIMEOUT_S
    box.give("0" * 32, b"late")
    assert 0 < redis.pttl(INQUIRY_ANSWER("0" * 32)) <= 1000 * MAX_TIMEOUT_S


@pytest.mark.parametrize("poison", [b"", b"garbage", pickle.dumps(ANSWER), b"\xff" * 100])
def test_poison_on_the_list_is_a_message_error_and_gone(
    redis: Redis, box: InquiryBox, poison: bytes
) -> None:
    redis.rpush(INQUIRIES(MODEL), poison)
    with pytest.raises(MessageError, match=f"{len(poison)} bytes"):
        box.wait(SHORT_S)
    assert redis.llen(INQUIRIES(MODEL)) == 0


def test_what_stands_behind_a_good_head_is_for_the_answerer_to_check(
    redis: Redis, box: InquiryBox
) -> None:
    redis.rpush(INQUIRIES(MODEL), b"9" * 45 + b"poison")
    inquiry = box.wait(SHORT_S)
    assert inquiry is not None
    assert (inquiry.inquiry_id, inquiry.body) == ("9" * 32, b"poison")


def test_a_spoilt_answer_is_a_message_error(redis: Redis, box: InquiryBox) -> None:
    with answering(box, pickle.dumps(ANSWER)), pytest.raises(MessageError):
        ask(redis, MODEL, QUESTION)


def test_keys_of_a_wrong_type_are_a_broker_error(redis: Redis, box: InquiryBox) -> None:
    redis.set(INQUIRIES(MODEL), "x")
    with pytest.raises(BrokerError):
        ask(redis, MODEL, QUESTION, SHORT_S)
    with pytest.raises(BrokerError):
        box.wait(SHORT_S)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, MAX_TIMEOUT_S + 1, float("nan")])
def test_a_wait_that_makes_no_sense_is_refused(redis: Redis, timeout_s: float) -> None:
    with pytest.raises(MessageError, match="timeout_s"):
        ask(redis, MODEL, QUESTION, timeout_s)


def test_two_workers_share_the_questions(redis: Redis, box: InquiryBox) -> None:
    ids: list[list[str]] = []
    with answering(box, *[encode_answer(ANSWER)] * 3) as first:
        with answering(InquiryBox(redis, MODEL), *[encode_answer(ANSWER)] * 3) as second:
            for _ in range(6):
                assert ask(redis, MODEL, QUESTION) == ANSWER
        ids += [first, second]
    assert [len(found) for found in ids] == [3, 3]


def test_behind_a_prefix_nobody_else_hears_the_question(redis: Redis, box: InquiryBox) -> None:
    with pytest.raises(NoWorkerError):
        ask(redis, MODEL, QUESTION, SHORT_S, prefix="{team}:")
    assert box.wait(SHORT_S) is None
    until(lambda: redis.llen(INQUIRIES(MODEL, prefix="{team}:")) == 0, "nothing was written")
