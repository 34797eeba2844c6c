import threading

import pytest

from mixfleet import Client
from mixfleet.attendance import Attendance
from mixfleet_broker.errors import MessageError
from mixfleet_broker.settings import Settings
from support.fake_transport import FakeClock, FakeTransport, answer
from support.worker_process import until


def test_a_job_is_attended_until_it_is_left() -> None:
    transport = FakeTransport(FakeClock())
    attendance = Attendance(transport, period_s=0.01)
    attendance.enter("a")
    attendance.enter("b")
    until(lambda: {"a", "b"} <= set(transport.attended), "both are attended")
    attendance.leave("a")
    attendance.leave("unknown")
    transport.attended.clear()
    until(lambda: transport.attended[-3:] == ["b", "b", "b"], "one is attended on")
    attendance.close()
    count = len(transport.attended)
    assert not any(thread.name == "attendance" for thread in threading.enumerate())
    assert len(transport.attended) == count


def test_an_outage_does_not_end_the_attendance() -> None:
    clock = FakeClock()
    transport = FakeTransport(clock)
    transport.outage_until = clock.now + 1
    attendance = Attendance(transport, period_s=0.01)
    attendance.enter("a")
    clock.now += 2
    until(lambda: "a" in transport.attended, "it is attended after the outage")
    attendance.close()


def test_a_client_without_such_jobs_starts_no_thread() -> None:
    transport = FakeTransport(FakeClock(), answer("Hello"))
    with Client(settings=Settings(), transport=transport, clock=transport.clock) as client:
        client.chat("x").result()
        assert not any(thread.name == "attendance" for thread in threading.enumerate())


def test_a_job_that_ends_with_its_reader_says_so_and_cannot_be_left_alone() -> None:
    transport = FakeTransport(FakeClock(), answer("Hello"))
    with (
        Client(settings=Settings(), transport=transport, clock=transport.clock) as client,
        client.chat("x", on_disconnect="cancel") as stream,
    ):
        assert transport.terms[-1].ends_with_reader
        with pytest.raises(MessageError, match="on_disconnect='continue'"):
            stream.detach()
        stream.result()


def test_another_word_for_a_disconnect_is_refused() -> None:
    transport = FakeTransport(FakeClock())
    with (
        Client(settings=Settings(), transport=transport, clock=transport.clock) as client,
        pytest.raises(MessageError, match="continue, cancel"),
    ):
        client.chat("x", on_disconnect="explode")  # type: ignore[arg-type]
    assert transport.terms == []
