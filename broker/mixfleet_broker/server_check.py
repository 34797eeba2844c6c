"""Whether a Redis is fit for a fleet: what would lose or drop jobs, and how to mend it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from redis import Redis

from mixfleet_broker.errors import ConfigError
from mixfleet_broker.redis_url import safe_redis_url
from mixfleet_broker.server_facts import ServerFacts, server_facts

Level = Literal["ok", "warning", "refuse"]

OLDEST: Final = (6, 2)
"""The first with XADD NOMKSTREAM."""
DRAINS_WHEN_FULL: Final = (7, 0)
"""The first whose scripts may go over the memory limit, so that a full server can drain."""
_KEEPS: Final = "noeviction"
_WANTED: Final = {"maxmemory-policy": _KEEPS, "appendonly": "yes", "appendfsync": "everysec"}
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at."""

    topic: Literal["version", "mode", "memory", "persistence", "replication", "unknown"]
    level: Level
    """``warning``: jobs may be lost in a case that the text names; ``refuse``: no fleet runs."""
    text: str


def check_server(redis: Redis) -> list[Finding]:
    """Look at the server of ``redis`` and say what is found, as far as its user may ask.

    Raises:
        BrokerUnavailableError: It does not answer.
    """
    return findings(server_facts(redis))


def refuse_unfit(found: Iterable[Finding], url: str) -> None:
    """Raise if a finding says that no fleet may run on the server.

    Raises:
        ConfigError: With the text of each such finding.
    """
    refusals = [finding.text for finding in found if finding.level == "refuse"]
    if refusals:
        raise ConfigError(f"redis={safe_redis_url(url)}: {'; '.join(refusals)}")


def summary(found: Sequence[Finding]) -> str:
    """Return product and version, and how many warnings there are, for one line."""
    warnings = sum(finding.level == "warning" for finding in found)
    plural = "s" if warnings > 1 else ""
    counted = f", {warnings} warning{plural}: see `mixfleet doctor`" if warnings else ""
    return f"{found[0].text}{counted}"


def findings(facts: ServerFacts) -> list[Finding]:
    """Judge what a server says of itself; the version comes first."""
    found = [_version(facts), *_mode(facts)]
    if facts.mode != "sentinel":  # which has neither memory nor replicas of its own
        found += [*_replication(facts), *_memory(facts), *_persistence(facts), *_unknown(facts)]
    return found


def _version(facts: ServerFacts) -> Finding:
    if facts.version is None:
        text = "version not known: the user may ask by neither INFO nor HELLO"
        return Finding(topic="version", level="warning", text=text)
    name = f"{facts.product} {facts.version}"
    parts = [int(part) for part in facts.version.split(".") if part.isdecimal()]
    version = (*parts, 0, 0)[:2]
    if version < OLDEST:
        text = f"{name} is too old: install Redis 6.2 or newer, better 7.0 or newer, or Valkey"
        return Finding(topic="version", level="refuse", text=text)
    if version < DRAINS_WHEN_FULL:
        text = (
            f"{name} cannot drain once its maxmemory is reached: workers could not even end "
            "their jobs. Redis 7.0 or newer can, and Valkey"
        )
        return Finding(topic="version", level="warning", text=text)
    return Finding(topic="version", level="ok", text=name)


def _mode(facts: ServerFacts) -> Iterator[Finding]:
    if facts.mode == "cluster":
        text = (
            "it runs in cluster mode, which cannot hold a queue: all keys of a pool must be on one "
            "primary. Set cluster-enabled no, with a replica and Sentinels to fail over; "
            "more load takes one Redis per pool of workers"
        )
        yield Finding(topic="mode", level="refuse", text=text)
    elif facts.mode == "sentinel":
        text = (
            "it is a Sentinel and no Redis: write redis+sentinel://HOST:PORT/NAME with the name "
            "of its primary"
        )
        yield Finding(topic="mode", level="refuse", text=text)


def _replication(facts: ServerFacts) -> Iterator[Finding]:
    if facts.is_replica:
        text = (
            f"it is a replica{f' of {facts.primary}' if facts.primary else ''} and takes no "
            "writes: name the primary, or its Sentinels with redis+sentinel://"
        )
        yield Finding(topic="replication", level="refuse", text=text)
    elif facts.num_replicas:
        yield _failover(facts, facts.num_replicas)


def _failover(facts: ServerFacts, num_replicas: int) -> Finding:
    replicas = f"{num_replicas} replica{'s' if num_replicas > 1 else ''}"
    if facts.min_replicas_to_write == 0:
        text = (
            f"{replicas}, min-replicas-to-write 0: a primary that is cut off from them goes on "
            "taking jobs, which are lost when a replica takes over. Set min-replicas-to-write 1"
        )
        return Finding(topic="replication", level="warning", text=text)
    text = (
        f"{replicas}; a failover loses what had not reached the one that takes over, normally "
        "less than a second"
    )
    return Finding(topic="replication", level="ok", text=text)


def _memory(facts: ServerFacts) -> Iterator[Finding]:
    policy, limit = facts.maxmemory_policy, facts.maxmemory_bytes
    if policy is None or limit is None:
        return
    size = f"maxmemory {limit // _MIB} MiB" if limit else "no maxmemory"
    if policy == _KEEPS:
        used = "" if facts.used_bytes is None else f", {facts.used_bytes / _MIB:.1f} MiB used"
        yield Finding(topic="memory", level="ok", text=f"{size}, {policy}{used}")
    elif limit:
        text = (
            f"{size} with maxmemory-policy {policy}: once it is full it drops jobs and answers, "
            "and nobody hears of it. Set maxmemory-policy noeviction"
        )
        yield Finding(topic="memory", level="refuse", text=text)
    else:
        text = (
            f"{size}, but maxmemory-policy {policy}: with a limit it would drop jobs and answers. "
            "Set maxmemory-policy noeviction"
        )
        yield Finding(topic="memory", level="warning", text=text)


_FSYNC: Final[dict[str, tuple[Level, str]]] = {
    "always": (
        "ok",
        "no acknowledged job is lost, also when the machine dies; each write waits for the disk",
    ),
    "everysec": (
        "ok",
        "nothing is lost when Redis dies, up to 2 seconds when the machine does",
    ),
    "no": (
        "warning",
        "nothing is lost when Redis dies, but as much as the system has not written yet, often "
        "30 seconds, when the machine does. Set appendfsync everysec",
    ),
}


def _persistence(facts: ServerFacts) -> Iterator[Finding]:
    if facts.appendonly is False:
        yield Finding(topic="persistence", level="warning", text=_without_aof(facts.save))
    elif facts.append_fails:
        text = "its last write to the append-only file failed: see its log, the disk may be full"
        yield Finding(topic="persistence", level="warning", text=text)
    elif facts.appendonly and facts.appendfsync in _FSYNC:
        level, text = _FSYNC[facts.appendfsync]
        text = f"appendonly yes, appendfsync {facts.appendfsync}: {text}"
        yield Finding(topic="persistence", level=level, text=text)
    elif facts.appendonly:
        yield Finding(topic="persistence", level="ok", text="appendonly yes")


def _without_aof(save: str | None) -> str:
    lost = "all jobs and answers are lost when Redis ends or dies"
    if save != "":
        lost = "when Redis dies all is lost that came after its last snapshot"
    return f"appendonly no: {lost}. Set appendonly yes"


def _unknown(facts: ServerFacts) -> Iterator[Finding]:
    """Say what could not be asked; what can lose jobs unseen is a warning."""
    grave = {"maxmemory-policy": facts.maxmemory_policy, "appendonly": facts.appendonly}
    light = {"appendfsync": facts.appendfsync} if facts.appendonly is not False else {}
    names = [name for name, value in (grave | light).items() if value is None]
    if names:
        wanted = ", ".join(f"{name} (should be {_WANTED[name]})" for name in names)
        text = f"not known, as the user may not ask: {wanted}. Allow +info and +config|get"
        level: Level = "warning" if set(names) & set(grave) else "ok"
        yield Finding(topic="unknown", level=level, text=text)
