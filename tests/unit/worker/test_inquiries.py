"""The thread that answers inquiries, turn by turn, with a box of the test's own."""

import logging
import threading

import pytest

from mixfleet_broker.errors import BrokerUnavailableError, MessageError
from mixfleet_broker.inquiries import AskedInquiry
from mixfleet_worker.inquiries import InquiryDesk


class FakeBox:
    """Hands out what a test puts in, raising what is an error."""

    def __init__(self, *contents: AskedInquiry | Exception | None) -> None:
        self.contents = list(contents)
        self.given: list[tuple[str, bytes]] = []
        self.emptied = threading.Event()

    def wait(self, timeout_s: float) -> AskedInquiry | None:
        assert timeout_s > 0
        if not self.contents:
            self.emptied.set()
            return None
        found = self.contents.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def give(self, inquiry_id: str, answer: bytes) -> None:
        self.given.append((inquiry_id, answer))


def asked(body: bytes) -> AskedInquiry:
    return AskedInquiry(inquiry_id=body.decode() * 32, body=body, left_s=1.0)


class Desk:
    def __init__(self, *contents: AskedInquiry | Exception | None) -> None:
        self.now = 100.0
        self.box = FakeBox(*contents)
        self.desk = InquiryDesk(
            box=self.box, answer=bytes.upper, worker_id="w1", lease_s=15.0, clock=lambda: self.now
        )


def test_a_question_gets_its_answer() -> None:
    fixture = Desk(asked(b"a"), None, asked(b"b"))
    for _ in range(3):
        fixture.desk.turn()
    assert fixture.box.given == [("a" * 32, b"A"), ("b" * 32, b"B")]


def test_what_is_no_question_is_dropped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    fixture = Desk(MessageError("inquiry: 7 bytes without deadline and id"), asked(b"a"))
    fixture.desk.turn()
    fixture.desk.turn()
    assert "7 bytes" in caplog.text
    assert len(fixture.box.given) == 1


def test_an_outage_is_said_once_and_sat_out(caplog: pytest.LogCaptureFixture) -> None:
    away = [BrokerUnavailableError("no Redis answers") for _ in range(3)]
    fixture = Desk(*away, asked(b"a"))
    pauses = []
    with caplog.at_level(logging.INFO):
        for _ in range(4):
            fixture.desk.turn()
            pauses.append(fixture.desk._outage.pause_s)
            fixture.now += 10.0
    assert [pause > 0 for pause in pauses] == [True, True, True, False]
    assert len([m for m in caplog.messages if "broker away" in m]) == 1
    assert len(fixture.box.given) == 1


def test_the_thread_ends_when_it_is_told_to() -> None:
    fixture = Desk(asked(b"a"))
    thread = threading.Thread(target=fixture.desk.run)
    thread.start()
    assert fixture.box.emptied.wait(timeout=10)
    fixture.desk.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert fixture.box.given == [("a" * 32, b"A")]
