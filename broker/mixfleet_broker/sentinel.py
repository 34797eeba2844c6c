"""Redis Sentinels: asked where the primary of a service is."""

import threading
from collections.abc import Callable, Sequence

from redis.connection import AbstractConnection
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from mixfleet_broker.patience import refused_for_good
from mixfleet_broker.redis_url import Host

_DOWN = frozenset({"s_down", "o_down"})


class PrimaryFinder:
    """Finds the primary of one service, for all connections of a client and from any thread.

    Args:
        service: The primary's name at the Sentinels.
        sentinels: All of them, or as many as are known; the first that knows is believed.
        connection: Makes an unconnected connection to one, that fails soon and does not retry.
    """

    def __init__(
        self,
        service: str,
        sentinels: Sequence[Host],
        connection: Callable[[Host], AbstractConnection],
    ) -> None:
        self._service = service
        self._sentinels: Sequence[Host] = list(sentinels)
        self._connection = connection
        self._lock = threading.Lock()
        self._address: Host | None = None

    @property
    def address(self) -> Host | None:
        """Where the primary was found last."""
        return self._address

    def find(self) -> Host:
        """Return where the primary is.

        Raises:
            RedisConnectionError: No Sentinel knows one that is up; the text says what each of
                them said.
            AuthenticationError: A Sentinel refuses the user name or password, and no other
                knows.
        """
        answers: list[tuple[Host, Exception]] = []
        for sentinel in self._sentinels:
            try:
                address = self._ask(sentinel)
            except (RedisError, OSError, ValueError) as error:
                answers.append((sentinel, error))
                continue
            self._remember(sentinel, address)
            return address
        raise self._unknown(answers)

    def _ask(self, sentinel: Host) -> Host:
        connection = self._connection(sentinel)
        try:
            connection.connect()
            connection.send_command("SENTINEL", "MASTER", self._service, check_health=False)
            reply = [part.decode() for part in connection.read_response()]
        finally:
            connection.disconnect()
        facts = dict(zip(reply[::2], reply[1::2], strict=True))
        address = facts.get("ip", ""), int(facts.get("port", 0))
        if _DOWN & set(facts.get("flags", "").split(",")):
            raise RedisConnectionError(f"{_shown(address)} is down")
        return address

    def _remember(self, sentinel: Host, address: Host) -> None:
        with self._lock:
            # First next time, so that one that is away costs its timeout once.
            self._sentinels = sorted(self._sentinels, key=lambda known: known != sentinel)
            self._address = address

    def _unknown(self, answers: Sequence[tuple[Host, Exception]]) -> RedisConnectionError:
        for sentinel, error in answers:
            if refused_for_good(error) is not None:
                kind = type(error) if isinstance(error, AuthenticationError) else None
                refusal = (kind or RedisConnectionError)(f"Sentinel {_shown(sentinel)}: {error}")
                refusal.__cause__ = error
                return refusal
        said = "; ".join(f"{_shown(sentinel)}: {error}" for sentinel, error in answers)
        return RedisConnectionError(f"no primary of {self._service} at its Sentinels: {said}")


def _shown(host: Host) -> str:
    return f"{host[0]}:{host[1]}"
