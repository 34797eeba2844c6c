"""rq's tools as processes, stock and by `mixfleet rq`, with each rq that is installed here."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
import requests

from support.redis_server import RedisServer
from support.worker_process import until

ROOT = Path(__file__).parents[2]
OURS = os.pathsep.join(str(ROOT / top) for top in ("client", "broker", "engine", "worker"))
PYTHONS = {
    "installed": Path(sys.executable),
    # Its rq cannot share a venv with rq 3, nor can rq-exporter; mixfleet comes by PYTHONPATH.
    "rq2": ROOT / ".venv-rq2" / "bin" / "python",
}
RUN_LIMIT_S = 60.0


def python_of(name: str) -> Path:
    """The interpreter of one rq; skips the test where scripts/setup did not make it."""
    python = PYTHONS[name]
    if not python.exists():
        pytest.skip(f"no {python}: sh scripts/setup dev")
    return python


def environment(**more: str) -> dict[str, str]:
    """The environment of a tool: none of the user's settings; mixfleet, installed or not."""
    foreign = ("MIXFLEET_", "RQ_", "REDIS_URL")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    home = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), "/nowhere")
    return {**kept, **home, "PYTHONPATH": OURS, **more}


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class WebTool:
    """A tool that serves a page, on a port of this machine alone; ended with its block."""

    def __init__(
        self, command: list[str], port: int, env: Mapping[str, str], *, host: str = "127.0.0.1"
    ) -> None:
        self.port = port
        self._page = f"http://{host}:{port}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(command, env=env, stdout=self._log, stderr=self._log)
        self._session = requests.Session()
        self._session.trust_env = False
        try:
            until(self._answers, "the tool answers", RUN_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            self._log.seek(0)
            raise AssertionError(f"it has ended: {self._log.read()}")
        try:
            self.get("/")
        except requests.ConnectionError:
            return False
        return True

    def get(self, path: str, **options: Any) -> requests.Response:
        return self._session.get(f"{self._page}{path}", timeout=20, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        return self._session.post(f"{self._page}{path}", timeout=20, **options)

    def json(self, path: str) -> Any:
        """The page's data; whatever is wrong with a job, it is an answer and not an error."""
        answer = self.get(f"/0/data/{path}.json")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def jobs(self, queue: str, registry: str) -> list[Any]:
        """The rows of one list of jobs."""
        rows: list[Any] = self.json(f"jobs/{queue}/{registry}/8/asc/1")["jobs"]
        return rows

    def close(self) -> None:
        self._session.close()
        self.process.kill()
        self.process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Tools:
    """The tools of one rq on one server; each page is started when it is first asked for."""

    def __init__(self, python: Path, url: str, *, hardened: bool) -> None:
        self.python = python
        self.url = url
        self.hardened = hardened
        self._pages: dict[str, WebTool] = {}

    def run(self, command: str, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of rq's to its end."""
        start = ["-m", "mixfleet", "rq"] if self.hardened else ["-m", "rq.cli"]
        return subprocess.run(
            [self.python, *start, command, *arguments],
            env=self._environment(**env),
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
            check=False,
        )

    def info(self, **env: str) -> list[str]:
        """The lines of `rq info --raw`."""
        done = self.run("info", "--raw", **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    @property
    def dashboard(self) -> WebTool:
        stock = ["-m", "rq_dashboard", "--bind", "127.0.0.1"]
        return self._page("dashboard", stock)

    @property
    def exporter(self) -> WebTool:
        stock = ["-m", "rq_exporter", "--host", "127.0.0.1"]
        return self._page("exporter", stock)

    def close(self) -> None:
        for page in self._pages.values():
            page.close()

    def _page(self, name: str, stock: list[str]) -> WebTool:
        if name not in self._pages:
            port = free_port()
            start = ["-m", "mixfleet", "rq", name] if self.hardened else stock
            command = [str(self.python), *start, "--port", str(port)]
            self._pages[name] = WebTool(command, port, self._environment())
        return self._pages[name]

    def _environment(self, **more: str) -> dict[str, str]:
        if self.hardened:
            return environment(MIXFLEET_REDIS=self.url, **more)
        return environment(RQ_REDIS_URL=self.url, RQ_DASHBOARD_REDIS_URL=self.url, **more)


@pytest.fixture(scope="session", params=list(PYTHONS))
def rq_python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of each rq in turn."""
    return python_of(request.param)


@pytest.fixture(scope="session", params=["stock", "hardened"])
def tools(
    request: pytest.FixtureRequest, rq_python: Path, redis_server: RedisServer
) -> Iterator[Tools]:
    """Stock tools and ours in turn; they see the server that each test finds empty."""
    made = Tools(rq_python, redis_server.url, hardened=request.param == "hardened")
    yield made
    made.close()


@pytest.fixture(scope="session", params=["stock", "hardened"])
def exporting(request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[Tools]:
    """As ``tools``, with the one rq that rq-exporter can be installed beside."""
    made = Tools(python_of("rq2"), redis_server.url, hardened=request.param == "hardened")
    yield made
    made.close()


@pytest.fixture(scope="session")
def hardened(rq_python: Path, redis_server: RedisServer) -> Iterator[Tools]:
    """Our tools alone."""
    made = Tools(rq_python, redis_server.url, hardened=True)
    yield made
    made.close()
