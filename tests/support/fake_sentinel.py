"""A Sentinel that says what a test lets it say: real ones name the servers that they watch."""

import socketserver
import threading
from types import TracebackType
from typing import Self


class FakeSentinel:
    """Names ``127.0.0.1:primary_port`` as the primary of every service, on a loopback port."""

    def __init__(self, primary_port: int) -> None:
        facts = ("name", "any", "ip", "127.0.0.1", "port", str(primary_port), "flags", "master")
        reply = b"".join(b"$%d\r\n%s\r\n" % (len(fact), fact.encode()) for fact in facts)
        answers = {b"SENTINEL": b"*%d\r\n%s" % (len(facts), reply), b"PING": b"+PONG\r\n"}

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while (header := self.rfile.readline()).startswith(b"*"):
                    words = [self._word() for _ in range(int(header[1:]))]
                    self.wfile.write(answers.get(words[0], b"-ERR unknown command\r\n"))

            def _word(self) -> bytes:
                length = int(self.rfile.readline()[1:])
                return self.rfile.read(length + 2)[:-2]

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def port(self) -> int:
        port: int = self._server.server_address[1]
        return port

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
