"""The gateway that ``mixfleet up`` runs: a process of its own, for the worker never imports it."""

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final

from mixfleet_broker.settings import CONFIG_FLAG
from mixfleet_worker.up_lock import UpError
from mixfleet_worker.up_next_steps import flag

MODULES: Final = ("fastapi", "prometheus_client", "pydantic", "uvicorn")
"""What the extra ``gateway`` brings."""
SHARED_FLAGS: Final = (
    "redis",
    "data_dir",
    "key_prefix",
    "drain_s",
    "log_level",
    "log_json",
    CONFIG_FLAG,
)
"""Flags of ``mixfleet up`` that its gateway gets too; all else it reads by itself."""
_CONNECT_S: Final = 1.0


def gateway_is_installed() -> bool:
    """Whether the extra is there; nothing is imported for that."""
    return all(find_spec(module) is not None for module in MODULES)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGateway:
    """A gateway on this machine."""

    address: str
    """HOST:PORT; the port is not 0."""
    flags: Mapping[str, str]
    """Of its command line, by the names of settings."""

    @property
    def url(self) -> str:
        """Where it is found."""
        return f"http://{self.address}"

    def command(self) -> list[str]:
        """Return the command that runs it until this process has ended."""
        command = [sys.executable, "-m", "mixfleet", "gateway", "--parent-pid", str(os.getpid())]
        for name, value in {**self.flags, "listen": self.address}.items():
            command += [flag(name), value]
        return command

    def answers(self) -> bool:
        """Whether it takes connections."""
        host, port = _host_and_port(self.address)
        try:
            with socket.create_connection((host, port), timeout=_CONNECT_S):
                return True
        except OSError:
            return False


def free_address(listen: str) -> str:
    """Return ``listen``, with a free port in the place of port 0.

    Raises:
        UpError: It cannot be listened at.
    """
    host, port = _host_and_port(listen)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            # As the gateway will: what is left of a port's last connections does not hold it.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return f"{listen.rpartition(':')[0]}:{probe.getsockname()[1]}"
    except OSError as error:
        raise UpError(
            f"listen={listen}: the gateway cannot listen there ({error.strerror}); "
            "give another address with --listen HOST:PORT, or start without: --no-gateway"
        ) from error


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
