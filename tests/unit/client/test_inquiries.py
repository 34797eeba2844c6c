"""Counting and tokens through the client: what it asks, and what it makes of the answer."""

import pytest

from mixfleet import ChatMessage, Client
from mixfleet.errors import BrokerUnavailableError, InvalidMessagesError, UnknownModelError
from mixfleet_broker.inquiries import TIMEOUT_S
from mixfleet_broker.inquiry_codec import Detokenize, InquiryAnswer, TokenizeChat, TokenizeText
from mixfleet_broker.settings import Settings
from support.fake_transport import FakeTransport, fleet


@pytest.fixture
def transport() -> FakeTransport:
    transport, _ = fleet()
    transport.inquiry_answer = InquiryAnswer(
        num_tokens=7, context_length=64, max_answer_tokens=57, token_ids=(1, 2), text="Hi"
    )
    return transport


@pytest.fixture
def client(transport: FakeTransport) -> Client:
    return Client(settings=Settings(), transport=transport, clock=transport.clock)


def test_a_conversation_is_counted(client: Client, transport: FakeTransport) -> None:
    assert client.count_tokens("Hello?", system="Be brief.") == 7
    [(model, inquiry, timeout_s)] = transport.inquiries
    assert (model, timeout_s) == ("tiny", TIMEOUT_S)
    assert isinstance(inquiry, TokenizeChat)
    assert inquiry.detail == "count"
    assert inquiry.job.model == "tiny"
    assert inquiry.job.messages == (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Hello?"),
    )
    assert transport.jobs == {}


def test_text_becomes_tokens_and_tokens_text(client: Client, transport: FakeTransport) -> None:
    assert client.tokenize("Hi", model="big", timeout_s=2.0) == (1, 2)
    assert client.tokenize("Hi", add_special_tokens=False) == (1, 2)
    assert client.detokenize([1, 2]) == "Hi"
    assert transport.inquiries == [
        ("big", TokenizeText(text="Hi"), 2.0),
        ("tiny", TokenizeText(text="Hi", add_special_tokens=False), TIMEOUT_S),
        ("tiny", Detokenize(token_ids=(1, 2)), TIMEOUT_S),
    ]


def test_what_cannot_be_asked_is_not_asked(client: Client, transport: FakeTransport) -> None:
    with pytest.raises(InvalidMessagesError):
        client.count_tokens([{"role": "user", "text": "x"}])
    transport.served = ("a", "b")
    with pytest.raises(UnknownModelError):
        client.tokenize("x")
    assert transport.inquiries == []


def test_an_outage_is_told(client: Client, transport: FakeTransport) -> None:
    transport.outage_until = transport.clock.now + 60
    with pytest.raises(BrokerUnavailableError):
        client.tokenize("x", model="tiny")
