"""A real primary, a real replica and real Sentinels on loopback that fail over within two seconds.

Sentinels from Redis 7.0 on, and Valkey's, can be told to look more often than they do by
themselves; with older ones a failover takes a few seconds longer.
"""

import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from mixfleet_broker.server_binary import find_server
from support.worker_process import until

SERVICE = "mymaster"
DOWN_AFTER_MS = 500
_LOOK_MS = 100
_REPLICATION_USER = "replica"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Node:
    """One server process: a Redis or a Sentinel."""

    def __init__(self, program: Path, directory: Path, name: str, password: str = "") -> None:
        self.port = free_port()
        self.name = name
        self.password = password
        self._program = program
        self._directory = directory / name
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, lines: list[str], *flags: str) -> None:
        self._directory.mkdir()
        config = self._directory / "server.conf"
        own = [f"port {self.port}", "bind 127.0.0.1", f"dir {self._directory}", "daemonize no"]
        own += [f"requirepass {self.password}"] if self.password else []
        config.write_text("\n".join([*own, *lines]) + "\n")
        log = (self._directory / "log").open("wb")
        with log:
            self._process = subprocess.Popen(
                [self._program, config, *flags], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        until(self._answers, f"{self.name} answers")

    def client(self) -> Redis:
        """A client of this very server, that does not try twice."""
        return Redis(
            port=self.port,
            password=self.password or None,
            decode_responses=True,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=1.0,
        )

    def ask(self, *command: str | int) -> object:
        with self.client() as client:
            return client.execute_command(*command)

    def role(self) -> str:
        """ "master", "slave", or "none" while it does not answer."""
        try:
            role = self.ask("ROLE")
        except (RedisError, OSError):
            return "none"
        return str(role[0]) if isinstance(role, list) else "none"

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        return (self._directory / "log").read_text(errors="replace")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log
        with suppress(RedisError, OSError):
            return bool(self.ask("PING"))
        return False


def _facts(reply: object) -> dict[str, str]:
    assert isinstance(reply, list)
    return dict(zip(reply[::2], reply[1::2], strict=True))


class SentinelCluster:
    """A primary, a replica and Sentinels, as a context manager.

    Args:
        num_sentinels: One is enough to fail over, and the quickest.
        options: Lines of both servers' configuration, such as ``min-replicas-to-write 1``.
        password: Of the two servers.
        sentinel_password: Of the Sentinels.
        program: The server to run as all of these; default: what ``find_server()`` finds.
    """

    def __init__(
        self,
        *options: str,
        num_sentinels: int = 1,
        password: str = "",
        sentinel_password: str = "",
        program: Path | None = None,
    ) -> None:
        program = program or find_server()
        self._directory = Path(tempfile.mkdtemp(prefix="mixfleet-"))
        self._options = list(options)
        self._password = password
        self._sentinel_password = sentinel_password
        self.servers = [Node(program, self._directory, name, password) for name in ("a", "b")]
        self.sentinels = [
            Node(program, self._directory, f"sentinel-{number}", sentinel_password)
            for number in range(num_sentinels)
        ]

    @property
    def url(self) -> str:
        """What a client is given: follows the primary wherever it is."""
        user = f":{self._password}@" if self._password else ""
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.sentinels)
        query = f"?sentinel_password={self._sentinel_password}" if self._sentinel_password else ""
        return f"redis+sentinel://{user}{hosts}/{SERVICE}/0{query}"

    @property
    def primary(self) -> Node:
        """The server that the Sentinels name now."""
        reply = self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        assert isinstance(reply, list)
        return next(node for node in self.servers if node.port == int(reply[1]))

    @property
    def replica(self) -> Node:
        """The other one."""
        return next(node for node in self.servers if node is not self.primary)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for node in [*self.sentinels, *self.servers]:
            node.kill()
        shutil.rmtree(self._directory)

    def _start(self) -> None:
        first, second = self.servers
        first.start(self._server_lines())
        second.start([*self._server_lines(), f"replicaof 127.0.0.1 {first.port}"])
        until(self._is_in_sync, "the replica is in sync")
        for sentinel in self.sentinels:
            sentinel.start(self._sentinel_lines(first.port), "--sentinel")
            self._hurry(sentinel)
        until(self._all_are_ready, "the Sentinels know the replica and each other")

    def _server_lines(self) -> list[str]:
        return [
            'save ""',
            "repl-diskless-sync-delay 0",
            "repl-timeout 2",
            # A user of its own for replication, that can be shut out: see cut_replica_link.
            f"user {_REPLICATION_USER} on >replication +psync +replconf +ping",
            f"masteruser {_REPLICATION_USER}",
            "masterauth replication",
            *self._options,
        ]

    def _sentinel_lines(self, port: int) -> list[str]:
        quorum = len(self.sentinels) // 2 + 1
        lines = [
            f"sentinel monitor {SERVICE} 127.0.0.1 {port} {quorum}",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
            f"sentinel failover-timeout {SERVICE} 3000",
        ]
        if self._password:
            lines.append(f"sentinel auth-pass {SERVICE} {self._password}")
        return lines

    def _hurry(self, sentinel: Node) -> None:
        with suppress(RedisError):
            # Not PING-PERIOD: five of them are how old a replica's facts may be at a failover.
            for name in ("INFO-PERIOD", "PUBLISH-PERIOD", "ASK-PERIOD"):
                sentinel.ask("SENTINEL", "DEBUG", name, _LOOK_MS)

    def _all_are_ready(self) -> bool:
        return all(map(self._is_ready, self.sentinels))

    def _is_ready(self, sentinel: Node) -> bool:
        """Whether it knows the others, and a replica that it could promote."""
        facts = _facts(sentinel.ask("SENTINEL", "MASTER", SERVICE))
        replicas = sentinel.ask("SENTINEL", "REPLICAS", SERVICE)
        assert isinstance(replicas, list)
        links = [_facts(replica)["master-link-status"] for replica in replicas]
        return links == ["ok"] and int(facts["num-other-sentinels"]) == len(self.sentinels) - 1

    def _is_in_sync(self) -> bool:
        # A replica may be called online by both sides a second before writes reach it.
        with self.servers[0].client() as client:
            try:
                client.set("probe", 1)
                client.delete("probe")
            except ResponseError:  # it must have a replica for that
                return False
            return int(client.execute_command("WAIT", 1, 100)) == 1

    def kill_primary(self) -> Node:
        """End the primary as a crash does, and return it."""
        primary = self.primary
        primary.kill()
        return primary

    def pause_primary(self) -> Node:
        """Stop the primary where it is, as a machine that sleeps, and return it."""
        primary = self.primary
        primary.signal(signal.SIGSTOP)
        return primary

    def cut_replica_link(self) -> None:
        """Let nothing reach the replica any more; the Sentinels still see both servers.

        They promote such a replica only within about ten times ``DOWN_AFTER_MS``.
        """
        primary = self.primary
        primary.ask("ACL", "SETUSER", _REPLICATION_USER, "off")
        primary.ask("CLIENT", "KILL", "TYPE", "replica")

    def await_failover(self, old: Node) -> Node:
        """Wait until another server than ``old`` is the primary, and return it."""
        until(lambda: self.primary is not old, "the Sentinels name another primary")
        new = self.primary
        until(lambda: new.role() == "master", "the new primary is one")
        return new
