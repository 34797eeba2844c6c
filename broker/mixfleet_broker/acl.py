"""Least privilege on a Redis of our own: which commands each kind of process needs on which keys.

For Redis 7 and newer and for Valkey, whose rules may bind a command to keys (selectors), also
inside scripts. A client knows the ids of its own jobs, which nobody can guess, and no rule lets it
list those of others. It may still spam under any tenant's name: strangers use the gateway.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from mixfleet_broker import keys
from mixfleet_broker.keys import KEYS, Key

PASSWORD: Final = "CHANGE-ME"
"""Where each user's own password goes."""
_ANY_MODEL: Final = "*"


@dataclass(frozen=True, slots=True)
class Grant:
    """Commands on keys."""

    commands: str
    """Separated by spaces, as Redis's rules name them."""
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One kind of process."""

    name: str
    meaning: str
    keyless: str
    """Commands that touch no key."""
    grants: tuple[Grant, ...]


_CONNECTION: Final = "ping select time script|load wait"

_ENDING: Final = (
    Grant("hget hset hdel hmget expire exists hincrby", (keys.JOB,)),
    Grant("xadd xrevrange expire del", (keys.CHANNEL,)),
    Grant("zadd zrem", (keys.DEADLINES, keys.CANCELED, keys.FAILED)),
    Grant("zrem", (keys.LEASES, keys.WIP, keys.EXECUTIONS)),
    Grant("hget del", (keys.EXECUTION,)),
    Grant("srem", (keys.WORKER_EXECUTIONS,)),
    Grant("exists set del", (keys.READER,)),
    Grant("exists", (keys.WORKER,)),
    Grant("rpush expire", (keys.CONTROL,)),
    Grant("expire", (keys.RESPONSE,)),
)
"""What it takes to end a job from outside."""

_SUBMITTING: Final = (
    Grant("evalsha llen rpush", (keys.QUEUE,)),
    Grant("zadd zrem zscore zrank zcount", (keys.READY,)),
    Grant("zrem zscore", (keys.SUSPECTS,)),
    Grant("zadd zrem", (keys.AGEING,)),
    Grant("zscore", (keys.DEADLINES,)),
    Grant("hget hset hdel hlen hmget", (keys.WAITING,)),
    Grant("hmget hincrby hdel", (keys.LOADS,)),
    Grant("zadd zscore", (keys.TAGS,)),
    Grant("hget", (keys.WEIGHTS, keys.RATES)),
    Grant("hgetall", (keys.CAPACITY,)),
    Grant("get", (keys.LIST_BASE,)),
    Grant("scard sadd", (keys.UNLISTED,)),
    Grant("zcard", (keys.LEASES,)),
    Grant("lpush llen expire", (keys.BELL,)),
    Grant("sadd", (keys.QUEUES,)),
    Grant("exists", (keys.SUSPENDED,)),
    Grant("xadd expire", (keys.RESULTS,)),
)

_READING: Final = (
    Grant("xread xrange xrevrange", (keys.CHANNEL,)),
    Grant("zrevrange", (keys.MODELS,)),
    Grant("zrange", (keys.WORKERS,)),
    Grant("hgetall", (keys.WORKER,)),
)

_KEY_RECORDS: Final = (keys.API_KEYS, keys.API_KEY, keys.API_SECRET, keys.AIME_SESSION)
_KEY_USE: Final = (keys.API_USE, keys.API_JOBS, keys.API_CHARGE)
_FILES: Final = (keys.FILE, keys.FILE_CONTENT, keys.OWN_FILES)
_BATCHES: Final = (keys.BATCH, keys.BATCH_DONE, keys.OWN_BATCHES, keys.BATCHES_OPEN)
_OF_QUEUES: Final = tuple(
    key for key in KEYS if key not in (*_KEY_RECORDS, *_KEY_USE, keys.RESPONSE, *_FILES, *_BATCHES)
)

_ADMITTING: Final = (
    Grant("exists", (keys.API_KEYS,)),
    Grant("hgetall", (keys.API_KEY,)),
    Grant("get", (keys.API_SECRET,)),
    Grant("get set", (keys.AIME_SESSION,)),
    Grant("evalsha hget hmget hset expire", (keys.API_USE,)),
    Grant("zadd zcard zrange zrem expire", (keys.API_JOBS,)),
    Grant("get set del", (keys.API_CHARGE,)),
)
"""What it takes to know API keys and to charge them, and not to make or change one."""

_OF_HTTP_CLIENTS: Final = (
    Grant("get set del expire", (keys.RESPONSE,)),
    Grant("evalsha exists hget hgetall hset del pttl pexpire", (keys.FILE,)),
    Grant("append strlen getrange exists del pttl pexpire", (keys.FILE_CONTENT,)),
    Grant("zadd zcard zrange zrevrange zrem pttl pexpire", (keys.OWN_FILES, keys.OWN_BATCHES)),
    Grant("evalsha exists hget hgetall hset hsetnx hincrby hdel pttl pexpire", (keys.BATCH,)),
    Grant("get setbit del pttl pexpire", (keys.BATCH_DONE,)),
    Grant("zadd zrange zrem zscore", (keys.BATCHES_OPEN,)),
)
"""Of HTTP clients, so nobody but gateways sees them."""

_KEEPING_KEYS: Final = (
    Grant("zadd zrange zrem", (keys.API_KEYS,)),
    Grant("evalsha exists hexists hget hmget hgetall hset hsetnx hdel del", (keys.API_KEY,)),
    Grant("set del", (keys.API_SECRET,)),
    Grant("evalsha hget hmget del", (keys.API_USE,)),
    Grant("zcard del", (keys.API_JOBS,)),
)

_ASKING: Final = (
    Grant("rpush llen pexpire", (keys.INQUIRIES,)),
    Grant("blpop", (keys.INQUIRY_ANSWER,)),
)
"""Who asks may not see what others ask, and finds answers by ids that nobody can guess."""

_ANY_STATE: Final = (
    "evalsha del exists expire pexpire persist type "
    "get set incr decr hget hmget hset hsetnx hdel hlen hexists hincrby hgetall hrandfield "
    "llen lindex lrange lpush rpush lpop lrem lset "
    "sadd srem scard sismember smembers srandmember "
    "zadd zrem zcard zcount zrank zrange zrevrange zrangebyscore zremrangebyscore zscore "
    "xadd xread xrange xrevrange xlen"
)

ROLES: Final[tuple[Role, ...]] = (
    Role(
        name="client",
        meaning="submits, reads and cancels jobs whose ids it knows",
        keyless=_CONNECTION,
        grants=(*_SUBMITTING, *_ENDING, *_READING, *_ASKING),
    ),
    Role(
        name="gateway",
        meaning="does so for many, looks after the queue, gives workers orders, charges API keys; "
        "claims nothing",
        keyless=f"{_CONNECTION} info multi exec",
        grants=(Grant(_ANY_STATE, _OF_QUEUES), *_ADMITTING, *_ASKING, *_OF_HTTP_CLIENTS),
    ),
    Role(
        name="worker",
        meaning="claims and answers jobs",
        keyless=f"{_CONNECTION} info multi exec config|get",
        grants=(
            Grant(f"{_ANY_STATE} zpopmin blpop", _OF_QUEUES),
            Grant("expire", (keys.RESPONSE,)),
        ),
    ),
    Role(
        name="keys",
        meaning="makes, changes and revokes API keys, for `mixfleet key`; sees no jobs",
        keyless=_CONNECTION,
        grants=_KEEPING_KEYS,
    ),
)


def acl_lines(prefix: str = "") -> list[str]:
    """Return the lines of an ACL file, one user a role, each with ``PASSWORD`` for its password."""
    return [f"user mixfleet-{role.name} {rules(role, prefix)}" for role in ROLES]


def rules(role: Role, prefix: str = "") -> str:
    """Return a role's rules as they follow its user's name."""
    selectors = " ".join(
        f"({_allowed(grant.commands)} {_patterns(grant.keys, prefix)})" for grant in role.grants
    )
    return f"on >{PASSWORD} resetkeys resetchannels -@all {_allowed(role.keyless)} {selectors}"


def acl_file(prefix: str = "") -> str:
    """Return the text of ``deploy/redis/users.acl``: comments above, users below.

    Redis takes no comments in a file of users, so the comments say how to cut them off.
    """
    head = [
        "# Users of least privilege for Redis 7 or newer and Valkey, made from the code (acl.py).",
        "# Without these comments, which Redis does not take, and with another key prefix:",
        "#   mixfleet queue acl > /etc/redis/users.acl",
        f"# Replace each {PASSWORD}, and put into redis.conf: aclfile /etc/redis/users.acl",
        "# For --durability fsync (7.2 or newer) the client and the gateway need +waitaof too.",
    ]
    head += [f"# mixfleet-{role.name}: {role.meaning}" for role in ROLES]
    return "\n".join([*head, *acl_lines(prefix)]) + "\n"


def _allowed(commands: str) -> str:
    return " ".join(f"+{command}" for command in commands.split())


def _patterns(kinds: Sequence[Key], prefix: str) -> str:
    return " ".join(f"~{pattern}" for pattern in sorted(set(_globs(kinds, prefix))))


def _globs(kinds: Iterable[Key], prefix: str) -> Iterable[str]:
    for kind in kinds:
        yield kind(*[_ANY_MODEL] * kind.num_fields, prefix=prefix)
