"""A network between Redis and those who use it: slow, lossy, cut, or dead on one side."""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

Target = Path | tuple[str, int]
"""A unix socket, or host and port."""
_BYTES: Final = 1 << 16


@dataclass(eq=False)
class _Connection:
    """One connection of a client, and the one to the server behind it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    is_dead: bool = False
    """Nothing is carried any more, and nobody is told."""

    def abort(self) -> None:
        """Cut it with a reset and no orderly end; harmless where it is cut already."""
        if not self.client.is_closing():
            linger = struct.pack("ii", 1, 0)
            client = self.client.get_extra_info("socket")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.client.transport.abort()
        self.server.transport.abort()


class Proxy:
    """A TCP port of loopback that leads to ``target``, as a context manager.

    Args:
        target: The server; may be changed, and then new connections go to the other one.
        seed: Chooses which replies are lost.
    """

    def __init__(self, target: Target, *, seed: int = 0) -> None:
        self.target = target
        self.delay_s = 0.0
        """How long anything takes on its way, in each direction."""
        self.loss = 0.0
        """How likely a reply is lost, and its connection with it, after the server had obeyed."""
        self.num_lost = 0
        self._random = random.Random(seed)
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}"

    def blackhole(self) -> None:
        """Carry nothing until :meth:`heal`; what was sent meanwhile arrives then."""
        self._call(self._flows.clear)

    def heal(self) -> None:
        """Carry everything again."""
        self._call(self._flows.set)

    def reset(self) -> None:
        """Cut all connections; new ones are carried."""

        def cut() -> None:
            for connection in tuple(self._connections):
                connection.abort()

        self._call(cut)

    def half_open(self) -> None:
        """Let all connections fall silent for ever, uncut; new ones are carried."""

        def bury() -> None:
            for connection in self._connections:
                connection.is_dead = True

        self._call(bury)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, what: Callable[[], object]) -> None:
        async def call() -> None:
            what()

        self._run(call())

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=20)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in tuple(self._connections):
            connection.abort()
        self._flows.set()
        await asyncio.gather(*self._tasks)
        await asyncio.sleep(0)  # lets the transports close what they have

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            from_server, to_server = await self._connect()
        except OSError:  # nobody is there
            writer.transport.abort()
            return
        connection = _Connection(client=writer, server=to_server)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._carry(connection, reader, to_server, is_reply=False),
                self._carry(connection, from_server, writer, is_reply=True),
            )
        finally:
            self._connections.discard(connection)
            connection.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self.target, Path):
            return await asyncio.open_unix_connection(self.target)
        return await asyncio.open_connection(*self.target)

    async def _carry(
        self,
        connection: _Connection,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        *,
        is_reply: bool,
    ) -> None:
        """Carry one direction to its end; the end of one is that of both."""
        due = self._loop.time()
        with suppress(OSError):
            while data := await source.read(_BYTES):
                if is_reply and self._random.random() < self.loss:
                    self.num_lost += 1
                    break
                if connection.is_dead:
                    continue
                await self._flows.wait()
                # Never before what was sent earlier, also when the way has become shorter.
                due = max(due, self._loop.time() + self.delay_s)
                self._loop.call_at(due, self._deliver, connection, sink, data)
        if not connection.is_dead:
            connection.abort()

    def _deliver(self, connection: _Connection, sink: asyncio.StreamWriter, data: bytes) -> None:
        if not (connection.is_dead or sink.transport.is_closing()):
            sink.write(data)
