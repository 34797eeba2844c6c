"""Finding the primary: whom of the Sentinels to ask and to believe. No server here."""

from typing import Any

import pytest
from redis.exceptions import AuthenticationError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from mixfleet_broker.redis_url import Host
from mixfleet_broker.sentinel import PrimaryFinder

A, B = ("a", 1), ("b", 2)
ONE, TWO = ("10.0.0.1", 6379), ("10.0.0.2", 6380)


def names(address: Host, flags: str = "master") -> list[bytes]:
    """A Sentinel's reply, with facts that nobody asked for."""
    host, port = address
    facts = {"name": "m", "ip": host, "port": str(port), "flags": flags, "quorum": "2"}
    return [part.encode() for pair in facts.items() for part in pair]


class Sentinels:
    """Answers by name; an answer that is an error is raised. Writes down who was asked."""

    def __init__(self, answers: dict[Host, Any]) -> None:
        self.answers = answers
        self.asked: list[Host] = []
        self.num_open = 0

    def __call__(self, sentinel: Host) -> Any:
        return Connection(self, sentinel)

    def finder(self) -> PrimaryFinder:
        return PrimaryFinder("m", list(self.answers), self)


class Connection:
    def __init__(self, sentinels: Sentinels, sentinel: Host) -> None:
        self._sentinels = sentinels
        self._sentinel = sentinel

    def connect(self) -> None:
        self._sentinels.asked.append(self._sentinel)
        self._sentinels.num_open += 1

    def send_command(self, *command: str, check_health: bool) -> None:
        assert command == ("SENTINEL", "MASTER", "m")
        assert not check_health

    def read_response(self) -> Any:
        answer = self._sentinels.answers[self._sentinel]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def disconnect(self) -> None:
        self._sentinels.num_open -= 1


def test_the_first_sentinel_that_knows_is_believed_and_no_connection_stays_open() -> None:
    sentinels = Sentinels({A: names(ONE), B: names(TWO)})
    finder = sentinels.finder()
    assert finder.address is None
    assert finder.find() == finder.address == ONE
    assert sentinels.asked == [A]
    assert sentinels.num_open == 0


@pytest.mark.parametrize(
    "answer",
    [
        RedisConnectionError("refused"),
        OSError("no route"),
        ResponseError("No such master with that name"),
        names(TWO, "s_down,master"),
        names(TWO, "o_down,s_down,master,disconnected"),
        [b"odd"],
    ],
)
def test_a_sentinel_that_knows_no_live_primary_is_passed_over_and_asked_last(answer: Any) -> None:
    sentinels = Sentinels({A: answer, B: names(ONE)})
    finder = sentinels.finder()
    assert finder.find() == ONE
    assert finder.find() == ONE
    assert sentinels.asked == [A, B, B]
    assert sentinels.num_open == 0


def test_when_nobody_knows_the_error_says_what_each_of_them_said() -> None:
    down = names(ONE, "s_down,master")
    sentinels = Sentinels({A: RedisConnectionError("refused"), B: down})
    with pytest.raises(RedisConnectionError) as caught:
        sentinels.finder().find()
    text = "no primary of m at its Sentinels: a:1: refused; b:2: 10.0.0.1:6379 is down"
    assert str(caught.value) == text
    assert not isinstance(caught.value, AuthenticationError)


def test_a_refused_password_is_told_apart_unless_another_sentinel_knows() -> None:
    refusal = AuthenticationError("WRONGPASS")
    sentinels = Sentinels({A: refusal, B: RedisConnectionError("refused")})
    with pytest.raises(AuthenticationError, match="Sentinel a:1: WRONGPASS"):
        sentinels.finder().find()
    assert Sentinels({A: refusal, B: names(ONE)}).finder().find() == ONE


def test_a_new_primary_replaces_the_one_found_before() -> None:
    sentinels = Sentinels({A: names(ONE)})
    finder = sentinels.finder()
    finder.find()
    sentinels.answers[A] = names(TWO)
    assert finder.address == ONE
    assert finder.find() == finder.address == TWO
