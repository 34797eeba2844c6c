"""`mixfleet rq` as a user starts it: which server, who may look, and what it keeps to itself."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis

from mixfleet_broker.embedded import EmbeddedRedis
from mixfleet_broker.keys import JOB
from mixfleet_broker.queue import JobQueue
from support.queue_jobs import MODEL, chat_job
from support.redis_server import RedisServer
from support.rq_tools import Tools, WebTool, environment, free_port

pytestmark = pytest.mark.slow

PASSWORD = "hush-hush"
ANOTHER_ADDRESS = "127.0.0.2"
"""Of this machine too: it leads to who listens on every address, and not to 127.0.0.1 alone."""


def mixfleet_rq(python: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [python, "-m", "mixfleet", "rq", *arguments],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def submit(url: str, **options: str) -> None:
    with Redis.from_url(url, **options) as redis:
        JobQueue(redis, MODEL).submit(chat_job())


def dashboard(python: Path, *arguments: str, **env: str) -> WebTool:
    port = free_port()
    command = [str(python), "-m", "mixfleet", "rq", "dashboard", "--port", str(port), *arguments]
    return WebTool(command, port, environment(**env))


@pytest.fixture
def locked_url() -> Iterator[str]:
    """The URL of a server with a password, on a port."""
    port = free_port()
    with RedisServer("--port", str(port), "--bind", "127.0.0.1") as server:
        with server.client() as redis:
            redis.config_set("requirepass", PASSWORD)
        yield f"redis://:{PASSWORD}@127.0.0.1:{port}/0"


@pytest.fixture
def tls_url(tmp_path: Path) -> Iterator[str]:
    """The URL of a server that speaks TLS, with a certificate of its own."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate, port = str(tmp_path / "key"), str(tmp_path / "certificate"), free_port()
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = [*make.split(), *name, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--bind", "127.0.0.1"]
    options += ["--tls-cert-file", certificate, "--tls-key-file", key]
    with ExitStack() as stack:
        try:
            stack.enter_context(RedisServer(*options, "--tls-ca-cert-file", certificate))
        except RuntimeError:
            pytest.skip("this server cannot speak TLS")
        yield f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}"


@pytest.mark.parametrize("by", ["flag", "variable", "config"])
def test_the_server_is_chosen_as_for_every_command(
    redis_url: str, rq_python: Path, tmp_path: Path, by: str
) -> None:
    submit(redis_url)
    config = tmp_path / "config.toml"
    config.write_text(f'redis = "{redis_url}"\n')
    arguments = {"flag": ["--redis", redis_url], "config": ["--config", str(config)]}.get(by, [])
    env = {"MIXFLEET_REDIS": redis_url} if by == "variable" else {}
    done = mixfleet_rq(rq_python, "info", "--raw", *arguments, **env)
    assert done.returncode == 0, done.stderr
    assert f"queue {MODEL} 1, 0 executing" in done.stdout


def test_the_server_of_the_data_directory_is_found(rq_python: Path, tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        submit(server.url)
        done = mixfleet_rq(rq_python, "info", "--raw", "--data-dir", str(tmp_path))
    assert f"queue {MODEL} 1, 0 executing" in done.stdout, done.stderr


def test_a_server_with_tls_is_reached_by_each_tool(tls_url: str, rq_python: Path) -> None:
    submit(tls_url)
    done = mixfleet_rq(rq_python, "info", "--raw", "--redis", tls_url)
    assert f"queue {MODEL} 1, 0 executing" in done.stdout, done.stderr
    with dashboard(rq_python, "--redis", tls_url) as page:
        assert page.json("queues")["queues"][0]["count"] == 1


def test_without_a_server_there_is_one_line(rq_python: Path, tmp_path: Path) -> None:
    done = mixfleet_rq(rq_python, "dashboard", "--redis", f"unix://{tmp_path}/none.sock")
    assert done.returncode == 1
    assert "Error: no Redis answers at unix://" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_password_is_on_no_command_line_and_on_no_page(locked_url: str, rq_python: Path) -> None:
    submit(locked_url)
    with dashboard(rq_python, "--redis", locked_url) as page:
        seen = Path(f"/proc/{page.process.pid}/cmdline").read_text().split("\0")
        assert seen[1:5] == ["-P", "-m", "mixfleet_broker.rq_tools", "dashboard"]
        assert PASSWORD not in " ".join(seen)
        assert page.json("queues")["queues"][0]["count"] == 1
        for view in ("queues", "workers", "jobs"):
            html = page.get(f"/0/view/{view}").text
            assert "redis://:***@127.0.0.1" in html
            assert PASSWORD not in html


def test_a_file_beside_the_user_is_no_module(
    redis_url: str, rq_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rq", "redis", "mixfleet_broker"):
        (tmp_path / f"{name}.py").write_text("import os; os.mkdir('marker')\n")
    command = [str(rq_python), "-P", "-m", "mixfleet", "rq", "info", "--redis", redis_url]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not os.path.exists("marker")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bind", "0.0.0.0"), "RQ_DASHBOARD_PASSWORD"),
        (("-b", "0.0.0.0", "--password", "x"), "go together"),
        (("--debug",), "--debug"),
    ],
)
def test_the_dashboard_does_not_let_strangers_in(
    redis_url: str, rq_python: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = mixfleet_rq(rq_python, "dashboard", "--redis", redis_url, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def listens_elsewhere(port: int) -> bool:
    """Whether another address than 127.0.0.1 leads to a listener."""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((ANOTHER_ADDRESS, port)) == 0


def test_the_dashboard_listens_on_this_machine_alone(redis_url: str, rq_python: Path) -> None:
    with dashboard(rq_python, "--redis", redis_url) as page:
        assert not listens_elsewhere(page.port)


def test_a_password_is_asked_for_by_whatever_name_it_is_reached(
    redis_url: str, rq_python: Path
) -> None:
    names = {"RQ_DASHBOARD_USERNAME": "ops", "RQ_DASHBOARD_PASSWORD": PASSWORD}
    queues, named = "/0/data/queues.json", {"Host": "ops.example"}
    with dashboard(rq_python, "--redis", redis_url, **names) as page:
        assert page.get(queues).status_code == 401
        assert page.get(queues, auth=("ops", "wrong")).status_code == 401
        assert page.get(queues, auth=("ops", PASSWORD), headers=named).status_code == 200


def test_the_exporter_listens_on_this_machine_alone_unless_told_otherwise(
    exporting: Tools,
) -> None:
    assert not listens_elsewhere(exporting.exporter.port)
    if exporting.hardened:
        port = free_port()
        command = [str(exporting.python), "-m", "mixfleet", "rq", "exporter", "-p", str(port)]
        env = environment(MIXFLEET_REDIS=exporting.url, RQ_EXPORTER_HOST=ANOTHER_ADDRESS)
        with WebTool(command, port, env, host=ANOTHER_ADDRESS):
            assert listens_elsewhere(port)


def test_a_name_that_leads_here_from_outside_is_refused(redis_url: str, hardened: Tools) -> None:
    del redis_url
    answer = hardened.dashboard.get("/0/data/queues.json", headers={"Host": "evil.example:80"})
    assert answer.status_code == 403
    assert "RQ_DASHBOARD_PASSWORD" in answer.text
    local = {"Host": "localhost:9181"}
    assert hardened.dashboard.get("/0/data/queues.json", headers=local).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_site_cannot_press_the_buttons(redis: Redis, hardened: Tools, site: str) -> None:
    job = chat_job()
    JobQueue(redis, MODEL).submit(job)
    page, delete = hardened.dashboard, f"/job/{job.job_id}/delete"
    for method, path in ((page.post, delete), (page.get, f"/requeue/{MODEL}")):
        assert method(path, headers={"Sec-Fetch-Site": site}).status_code == 403
    assert redis.exists(JOB(job.job_id))
    # A link from elsewhere only looks.
    seen = page.get("/0/view/queues", headers={"Sec-Fetch-Site": site})
    assert seen.status_code == 200
    assert page.post(delete, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    assert not redis.exists(JOB(job.job_id))
