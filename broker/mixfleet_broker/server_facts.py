"""What a Redis says of itself, as far as its user may ask."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from redis import Redis
from redis.exceptions import ResponseError

from mixfleet_broker.redis_errors import redis_errors

_CONFIG: Final = (
    "appendonly",
    "appendfsync",
    "save",
    "maxmemory",
    "maxmemory-policy",
    "min-replicas-to-write",
)
_REPLICA_ROLES: Final = frozenset({"slave", "replica"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What is known of one server; None stands for what it did not tell."""

    product: str = "Redis"
    """``Redis`` or ``Valkey``."""
    version: str | None = None
    mode: str | None = None
    """``standalone``, ``cluster`` or ``sentinel``."""
    is_replica: bool | None = None
    primary: str | None = None
    """Host and port of a replica's primary."""
    num_replicas: int | None = None
    min_replicas_to_write: int | None = None
    maxmemory_bytes: int | None = None
    """0: no limit."""
    maxmemory_policy: str | None = None
    used_bytes: int | None = None
    appendonly: bool | None = None
    appendfsync: str | None = None
    save: str | None = None
    """When it writes snapshots; empty: never."""
    append_fails: bool = False
    """Whether its last write to the append-only file failed."""


def server_facts(redis: Redis) -> ServerFacts:
    """Ask a server about itself, by INFO, CONFIG GET and HELLO, whichever of them are allowed.

    Args:
        redis: A client whose replies are bytes.

    Raises:
        BrokerUnavailableError: It does not answer.
    """
    with redis_errors():
        info = _info(redis)
        config = _config(redis)
        # Allowed to every user, but it says less, and nothing behind some proxies.
        hello = {} if info else _hello(redis)
    return ServerFacts(
        product="Valkey" if _is_valkey(info, hello) else "Redis",
        version=info.get("valkey_version") or info.get("redis_version") or hello.get("version"),
        mode=_mode(info, hello),
        is_replica=_is_replica(info, hello),
        primary=_primary(info),
        num_replicas=_whole(info.get("connected_slaves")),
        min_replicas_to_write=_whole(config.get("min-replicas-to-write")),
        maxmemory_bytes=_whole(info.get("maxmemory", config.get("maxmemory"))),
        maxmemory_policy=info.get("maxmemory_policy") or config.get("maxmemory-policy"),
        used_bytes=_whole(info.get("used_memory")),
        appendonly=_appendonly(info, config),
        appendfsync=config.get("appendfsync"),
        save=config.get("save"),
        append_fails=info.get("aof_last_write_status", "ok") != "ok",
    )


def _info(redis: Redis) -> Mapping[str, Any]:
    try:
        return dict(redis.info())
    except ResponseError:  # not allowed, or renamed
        return {}


def _config(redis: Redis) -> dict[str, str]:
    found: dict[str, str] = {}
    with redis.pipeline(transaction=False) as pipeline:
        for name in _CONFIG:  # one by one: several at once take version 7
            pipeline.config_get(name)
        for reply in pipeline.execute(raise_on_error=False):
            if not isinstance(reply, Exception):
                found |= {_text(name): _text(value) for name, value in reply.items()}
    return found


def _hello(redis: Redis) -> dict[str, str]:
    try:
        reply: Any = redis.execute_command("HELLO")
    except ResponseError:
        return {}
    parts = [_text(part) for part in reply]
    return dict(zip(parts[::2], parts[1::2], strict=False))


def _is_valkey(info: Mapping[str, Any], hello: Mapping[str, str]) -> bool:
    return "valkey" in (info.get("server_name"), hello.get("server")) or "valkey_version" in info


def _mode(info: Mapping[str, Any], hello: Mapping[str, str]) -> str | None:
    if info.get("cluster_enabled") == 1:
        return "cluster"
    mode = info.get("redis_mode") or info.get("server_mode") or hello.get("mode")
    return None if mode is None else str(mode)


def _is_replica(info: Mapping[str, Any], hello: Mapping[str, str]) -> bool | None:
    role = info.get("role") or hello.get("role")
    return None if role is None else role in _REPLICA_ROLES


def _primary(info: Mapping[str, Any]) -> str | None:
    host = info.get("master_host")
    return None if host is None else f"{host}:{info.get('master_port')}"


def _appendonly(info: Mapping[str, Any], config: Mapping[str, str]) -> bool | None:
    if "aof_enabled" in info:
        return bool(info["aof_enabled"])
    return config["appendonly"] == "yes" if "appendonly" in config else None


def _whole(value: object) -> int | None:
    return None if value is None else int(str(value))


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
