"""The scripts: loaded from ``scripts/*.lua``, named by their content, run on any server."""

from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Any, Final, Literal, get_args

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import NoScriptError, ResponseError

from mixfleet_broker.keys import API_KEY, API_USE, BATCH, FILE, QUEUE, Key, lua_key_table

ScriptName = Literal[
    "submit",
    "ask",
    "claim",
    "renew",
    "append",
    "finish",
    "reap",
    "cancel",
    "requeue",
    "expire",
    "standing",
    "beat",
    "admit",
    "settle",
    "key_create",
    "key_change",
    "key_rotate",
    "key_revoke",
    "file_add",
    "file_delete",
    "batch_open",
    "batch_lease",
    "batch_append",
    "batch_move",
]
Argument = str | bytes | int | float

SCRIPT_NAMES: Final[tuple[ScriptName, ...]] = get_args(ScriptName)
# Whatever lets a full Redis drain may go over the limit: a claim too, or a Redis full of waiting
# jobs would stay full. Only what adds to it is refused.
_REFUSED_WHEN_FULL: Final = frozenset(
    {
        *("submit", "requeue", "ask", "admit", "key_create"),
        *("file_add", "batch_open", "batch_append"),
    }
)
_FIRST_KEYS: Final[dict[str, Key]] = {
    "admit": API_USE,
    "settle": API_USE,
    "key_create": API_KEY,
    "key_change": API_KEY,
    "key_rotate": API_KEY,
    "key_revoke": API_KEY,
    "file_add": FILE,
    "file_delete": FILE,
    "batch_open": BATCH,
    "batch_lease": BATCH,
    "batch_append": BATCH,
    "batch_move": BATCH,
}
"""Scripts that are about an API key, a file or a batch, not about a queue, with their KEYS[1]."""
_USES: Final = "-- uses:"


def milliseconds(seconds: float) -> int:
    """Return a length of time as scripts and Redis take it: whole, and never 0, which is none."""
    return max(1, round(seconds * 1000))


class Scripts:
    """The scripts on one server; safe to share between threads.

    A script is called by the hash of its text, so two versions of mixfleet live side by side on
    one server, and a server that has lost its scripts is simply given them again.

    Args:
        redis: A client whose replies are bytes.
        prefix: Before all keys, on a server that is shared with others.
    """

    def __init__(self, redis: Redis, prefix: str = "") -> None:
        self._redis = redis
        self._prefix = prefix
        self._with_flags = True

    def run(self, name: ScriptName, whose: str, *args: Argument) -> Any:
        """Run a script and return its reply.

        Args:
            name: The file without its suffix.
            whose: What it is about, ARGV[1]: the model of the queue, with rq's list as KEYS[1];
                for the scripts of API keys, files and batches its id, with its hash as KEYS[1].
            args: ARGV from the second on.
        """
        key = self._first_key(name, whose)
        try:
            return self._redis.evalsha(self._digest(name), 1, key, whose, *args)
        except NoScriptError:
            self._load(name)
            return self._redis.evalsha(self._digest(name), 1, key, whose, *args)

    def queue_on(self, pipeline: Pipeline, name: ScriptName, whose: str, *args: Argument) -> None:
        """Put a call on a pipeline; its reply may be a ``NoScriptError``: then use :meth:`run`."""
        pipeline.evalsha(self._digest(name), 1, self._first_key(name, whose), whose, *args)

    def _first_key(self, name: ScriptName, whose: str) -> str:
        return _FIRST_KEYS.get(name, QUEUE)(whose, prefix=self._prefix)

    def _digest(self, name: ScriptName) -> str:
        return script_digest(name, with_flags=self._with_flags, prefix=self._prefix)

    def _text(self, name: ScriptName, *, with_flags: bool) -> str:
        return script_text(name, with_flags=with_flags, prefix=self._prefix)

    def _load(self, name: ScriptName) -> None:
        try:
            self._redis.script_load(self._text(name, with_flags=self._with_flags))
        except ResponseError:
            if not self._with_flags:
                raise
            # A server before version 7 takes the line with the flags for Lua. From now on without.
            self._redis.script_load(self._text(name, with_flags=False))
            self._with_flags = False


@cache
def script_text(name: ScriptName, *, with_flags: bool, prefix: str = "") -> str:
    """Return the whole text of a script: flags, names of keys, the parts that it uses, itself.

    Args:
        name: The file without its suffix.
        with_flags: Whether the server knows ``#!lua flags``, as Redis does from version 7 on.
        prefix: Before all keys.
    """
    flags = "" if name in _REFUSED_WHEN_FULL else " flags=allow-oom"
    shebang = f"#!lua{flags}\n" if with_flags else ""
    body = _read(name)
    first_line, _, _ = body.partition("\n")
    used = first_line.removeprefix(_USES).split() if first_line.startswith(_USES) else []
    parts = ["base", *used]
    texts = (_read(f"parts/{part}") for part in parts)
    return f"{shebang}{lua_key_table(prefix)}{''.join(texts)}{body}"


@cache
def script_digest(name: ScriptName, *, with_flags: bool, prefix: str = "") -> str:
    """Return Redis's own name for a script: the SHA-1 of its text."""
    text = script_text(name, with_flags=with_flags, prefix=prefix)
    return sha1(text.encode(), usedforsecurity=False).hexdigest()


def _read(name: str) -> str:
    return (files("mixfleet_broker") / "scripts" / f"{name}.lua").read_text("utf-8")
