"""Questions and answers survive the wire; whatever is neither is refused in words."""

import pickle
import random

import msgpack
import pytest

from mixfleet_broker.errors import (
    InvalidMessagesError,
    InvalidRequestError,
    JobFailedError,
    MessageError,
    PromptTooLongError,
)
from mixfleet_broker.inquiry_codec import (
    MAX_ANSWER_BYTES,
    MAX_INQUIRY_BYTES,
    CheckJob,
    Detokenize,
    Inquiry,
    InquiryAnswer,
    TokenizeChat,
    TokenizeText,
    decode_answer,
    decode_inquiry,
    encode_answer,
    encode_inquiry,
    encode_refusal,
)
from mixfleet_broker.job_codec import encode_job
from mixfleet_broker.messages import MAX_COUNT, ChatJob, ChatMessage
from mixfleet_broker.packing import MAX_MESSAGE_BYTES

JOB = ChatJob(job_id="j1", model="tiny", messages=(ChatMessage(role="user", content="Hi"),))
INQUIRIES: list[Inquiry] = [
    TokenizeText(text="naïve 🙂"),
    TokenizeText(text="", add_special_tokens=False, detail="count"),
    TokenizeChat(job=JOB, detail="bytes"),
    Detokenize(token_ids=()),
    Detokenize(token_ids=(0, 1, 255, 256, MAX_COUNT)),
    CheckJob(payload=encode_job(JOB)),
    CheckJob(payload=b"not a job at all"),
]
ANSWERS = [
    InquiryAnswer(num_tokens=0, context_length=64, max_answer_tokens=64),
    InquiryAnswer(
        num_tokens=2,
        context_length=64,
        max_answer_tokens=62,
        token_ids=(5, 70_000),
        token_bytes=(b"\xf0\x9f", b""),
    ),
    InquiryAnswer(num_tokens=3, context_length=2, max_answer_tokens=0, text=""),
]


@pytest.mark.parametrize("inquiry", INQUIRIES)
def test_a_question_comes_out_as_it_went_in(inquiry: Inquiry) -> None:
    assert decode_inquiry(encode_inquiry(inquiry)) == inquiry


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_comes_out_as_it_went_in(answer: InquiryAnswer) -> None:
    assert decode_answer(encode_answer(answer)) == answer


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", InvalidRequestError),
        ("invalid_messages", InvalidMessagesError),
        ("prompt_too_long", PromptTooLongError),
        ("meteorite", JobFailedError),
    ],
)
def test_a_refusal_is_raised_as_the_error_of_such_a_job(code: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^of 9 and 10$") as caught:
        decode_answer(encode_refusal(code, "of 9 and 10"))
    assert caught.value.code == code  # type: ignore[attr-defined]


def test_a_refusal_may_quote_anything_however_long() -> None:
    with pytest.raises(InvalidRequestError, match="characters in all"):
        decode_answer(encode_refusal("invalid_request", "\ud800" + "x" * 2 * MAX_MESSAGE_BYTES))


def packed(**fields: object) -> bytes:
    data: bytes = msgpack.packb(fields)
    return data


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


GOOD = {"v": 1, "kind": "text", "text": "x", "special": True, "detail": "ids"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"garbage",
        pickle.dumps({"kind": "text"}),
        packed(**{**GOOD, "v": 2}),
        packed(**{**GOOD, "v": True, "kind": "check"}),
        packed(**{**GOOD, "kind": "poem"}),
        packed(**{**GOOD, "kind": ["text"]}),
        packed(**{**GOOD, "text": b"x"}),
        packed(**{**GOOD, "text": deep(20)}),
        packed(**{**GOOD, "special": 1}),
        packed(**{**GOOD, "detail": "all"}),
        packed(**{**GOOD, "more": 1}),
        packed(v=1, kind="ids", ids=[1, 2]),
        packed(v=1, kind="ids", ids=b"12345"),
        packed(v=1, kind="ids", ids=b"\xff\xff\xff\xff"),
        packed(v=1, kind="chat", job=b"junk", detail="ids"),
        packed(v=1, kind="check", job="text"),
        packed(**{**GOOD, "text": "x" * MAX_INQUIRY_BYTES}),
    ],
)
def test_what_is_no_question_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode_inquiry(data)


def test_no_bytes_do_anything_but_raise_the_one_error() -> None:
    source = random.Random(5)
    for inquiry in INQUIRIES:
        whole = bytearray(encode_inquiry(inquiry))
        for _ in range(300):
            damaged = bytearray(whole)
            damaged[source.randrange(len(damaged))] = source.randrange(256)
            try:
                decode_inquiry(bytes(damaged[: source.randrange(1, len(damaged) + 1)]))
            except MessageError:
                continue


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        packed(v=1, n=-1, l=1, m=1),
        packed(v=1, n=1, l=1),
        packed(v=1, n=1, l=1, m=1, i=b"123"),
        packed(v=1, n=1, l=1, m=1, b=["text"]),
        packed(v=1, c="x", e="y", n=1),
        packed(v=2, n=1, l=1, m=1),
    ],
)
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode_answer(data)


@pytest.mark.parametrize("token_id", [-1, MAX_COUNT + 1])
def test_a_number_that_is_no_token_id_cannot_be_asked_about(token_id: int) -> None:
    with pytest.raises(MessageError, match=str(token_id)):
        encode_inquiry(Detokenize(token_ids=(token_id,)))


def test_any_job_that_can_be_queued_can_be_asked_about() -> None:
    empty = ChatJob(job_id="j1", model="tiny", prompt="")
    room = MAX_MESSAGE_BYTES - len(encode_job(empty)) - 4
    job = ChatJob(job_id="j1", model="tiny", prompt="x" * room)
    payload = encode_job(job)
    assert len(payload) == MAX_MESSAGE_BYTES
    assert decode_inquiry(encode_inquiry(CheckJob(payload=payload))) == CheckJob(payload=payload)
    assert decode_inquiry(encode_inquiry(TokenizeChat(job=job))) == TokenizeChat(job=job)


def test_the_longest_text_has_an_answer_that_fits() -> None:
    num_tokens = MAX_MESSAGE_BYTES
    answer = InquiryAnswer(
        num_tokens=num_tokens,
        context_length=64,
        max_answer_tokens=0,
        token_ids=(MAX_COUNT,) * num_tokens,
        token_bytes=(b"x",) * num_tokens,
    )
    assert len(encode_answer(answer)) <= MAX_ANSWER_BYTES
