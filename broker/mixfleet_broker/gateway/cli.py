"""``mixfleet gateway``: HTTP in front of the queue."""

import gc
import os
import sys
import time
from threading import Thread
from typing import Any, Final

import click
import uvicorn

from mixfleet_broker.api_keys import any_keys
from mixfleet_broker.connection import connect, find_redis_url
from mixfleet_broker.errors import ConfigError
from mixfleet_broker.gateway.app import create_app
from mixfleet_broker.gateway.caller import is_loopback
from mixfleet_broker.gateway.connection_guard import GuardedProtocol
from mixfleet_broker.json_log import JsonFormatter
from mixfleet_broker.options import setting_options
from mixfleet_broker.settings import Settings

_LOOK_S: Final = 0.5
_TURN_S: Final = 0.001
_GARBAGE: Final = (5_000, 10, 20)
"""Python's own are (700, 10, 10), under which a thousand new streams are searched again and again.
A request leaves hardly any cycles, so what waits longer for the search is little."""
GATEWAY_SETTINGS: Final = (
    "redis",
    "data_dir",
    "key_prefix",
    "listen",
    "require_key",
    "tenant",
    "queue_limit",
    "queue_token_limit",
    "tenant_queue_limit",
    "tenant_token_limit",
    "on_disconnect",
    "keep_alive_s",
    "response_ttl_s",
    "batch_max_bytes",
    "batch_max_lines",
    "batch_stored_bytes",
    "batch_in_flight",
    "batch_ttl_s",
    "lease_s",
    "max_body_bytes",
    "max_connections",
    "cors_origins",
    "aime_endpoints",
    "vllm_metric_aliases",
    "drain_s",
    "log_level",
    "log_json",
)


@click.command()
@click.option("--parent-pid", type=int, hidden=True, help="End when this is not the parent.")
@setting_options(*GATEWAY_SETTINGS)
def gateway(parent_pid: int | None, settings: Settings) -> None:
    """Serve the clients that people have: OpenAI's, Anthropic's, AIME's, and curl.

    Stateless: run as many as you like on one Redis. On loopback no key is asked for while there is
    none; elsewhere `mixfleet key create` must come first.
    """
    check_exposure(settings)
    # The event loop gets its turn soon after a thread that read from Redis has begun.
    sys.setswitchinterval(_TURN_S)
    host, _, port = settings.listen.rpartition(":")
    config = uvicorn.Config(
        create_app(settings),
        host=host.strip("[]"),
        port=int(port),
        http=GuardedProtocol,
        log_config=log_config(settings),
        access_log=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        server_header=False,
        ws="none",
    )
    server = uvicorn.Server(config)
    if parent_pid is not None:
        Thread(target=_end_with_parent, args=(server, parent_pid), daemon=True).start()
    _leave_code_alone()
    server.run()


def _leave_code_alone() -> None:
    """Take what is loaded by now out of the search for garbage, and search less often.

    Modules, routes and schemas are most of all objects and stay for ever. To go through them while
    hundreds of streams begin costs much of the processor, and stops all streams meanwhile.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)


def _end_with_parent(server: uvicorn.Server, parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(_LOOK_S)
    server.should_exit = True


def check_exposure(settings: Settings) -> None:
    """Raise unless keys guard a gateway that others can reach.

    Raises:
        ConfigError: It would listen elsewhere than on loopback, and there is no key.
    """
    if is_loopback(settings.listen) and not settings.require_key:
        return
    with connect(find_redis_url(settings)) as redis:
        if not any_keys(redis, prefix=settings.key_prefix):
            raise ConfigError(
                f"listen={settings.listen}: others can reach it, and there is no API key yet; "
                "make one with `mixfleet key create --name NAME`"
            )


def log_config(settings: Settings) -> dict[str, Any]:
    """Return how the gateway logs: one line an event, JSON if asked."""
    text = {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}
    lines = {"()": JsonFormatter} if settings.log_json else text
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": lines},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines"}},
        "root": {"handlers": ["stderr"], "level": settings.log_level.upper()},
        "loggers": {"uvicorn": {"level": "INFO"}},
    }
