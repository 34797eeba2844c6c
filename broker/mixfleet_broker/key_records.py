"""What is known of an API key: plain values, and the fields of the hash that holds them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Final, Literal, cast, get_args

from mixfleet_broker.errors import MessageError
from mixfleet_broker.names import check_model_name, check_tenant
from mixfleet_broker.schema import integer
from mixfleet_broker.terms import PRIORITIES, Priority

Scope = Literal["chat", "ops", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
"""Ask the models; look at the fleet; change it. None holds another."""
MAX_NAME: Final = 80
MOST: Final[Mapping[str, int]] = {
    "requests_per_min": 10**6,
    "tokens_per_min": 10**9,
    "tokens_per_day": 10**12,
    # Where the limit is reached all of them are looked at, see admit.lua.
    "max_parallel_jobs": 10**4,
    "max_queued_jobs": 10**6,
    "max_queued_tokens": 10**12,
}
"""The largest number that each limit may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much an API key may ask for; None is no limit."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    """Tokens of prompts and answers; of an answer the most that it may have until it has ended."""
    tokens_per_day: int | None = None
    """A day is one of UTC."""
    max_parallel_jobs: int | None = None
    """Jobs queued or running, of all models."""
    max_queued_jobs: int | None = None
    """Jobs that wait, of one model; of all keys with the same tenant together."""
    max_queued_tokens: int | None = None
    """Tokens of those."""

    def check(self) -> None:
        """Check every limit.

        Raises:
            MessageError: One is not from 1 to its ``MOST``.
        """
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None:
                integer(value, name, 1, most)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTerms:
    """What an operator says of an API key."""

    name: str
    """For people; need not be unique."""
    tenant: str = ""
    """Whose its jobs are; empty: the key's own id."""
    scopes: frozenset[Scope] = frozenset({"chat"})
    priority: Priority = "default"
    """The highest that the key may ask for, and what its jobs get unless they ask."""
    models: frozenset[str] = frozenset()
    """Those that it may use; empty: all."""
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Check every field.

        Raises:
            MessageError: One cannot be used; the text names it.
        """
        if not (0 < len(self.name) <= MAX_NAME and self.name.isprintable()):
            raise MessageError(f"name: must be 1 to {MAX_NAME} printable characters")
        if self.tenant:
            check_tenant(self.tenant)
        if not self.scopes or not self.scopes <= set(SCOPES):
            raise MessageError(f"scopes={_words(self.scopes)!r}: must be of {', '.join(SCOPES)}")
        if self.priority not in PRIORITIES:
            known = ", ".join(PRIORITIES)
            raise MessageError(f"priority={self.priority!r}: must be one of {known}")
        for model in self.models:
            check_model_name(model)
        self.limits.check()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord(KeyTerms):
    """An API key without its secret. Times are Unix times by Redis's clock."""

    key_id: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    old_secret_until: float | None = None
    """Until when the secret before the last rotation is valid too; it may be over."""

    def may_use_model(self, model: str) -> bool:
        """Whether the key may ask this model."""
        return not self.models or model in self.models

    def may_use_priority(self, priority: Priority) -> bool:
        """Whether the key's jobs may have this priority: its own, or one that goes later."""
        return PRIORITIES.index(priority) >= PRIORITIES.index(self.priority)

    def is_expired(self, now: float) -> bool:
        """Whether its time is over at ``now``, a time by Redis's clock."""
        return self.expires_at is not None and now >= self.expires_at


def key_fields(terms: KeyTerms) -> dict[str, str]:
    """Return the fields of the hash that hold terms; what is not set is empty."""
    texts = {
        "name": terms.name,
        "tenant": terms.tenant,
        "scopes": _words(terms.scopes),
        "priority": terms.priority,
        "models": _words(terms.models),
    }
    numbers = asdict(terms.limits).items()
    return texts | {name: "" if value is None else str(value) for name, value in numbers}


def read_key(content: Mapping[bytes, bytes]) -> KeyRecord:
    """Return the key that a hash holds; fields of another version are passed over.

    Raises:
        MessageError: A field is missing or cannot be used: such a key opens nothing.
    """
    try:
        texts = {name.decode(): value.decode() for name, value in content.items()}
        record = KeyRecord(
            key_id=check_tenant(texts["key_id"]),
            name=texts["name"],
            tenant=texts["tenant"] or texts["key_id"],
            scopes=cast("frozenset[Scope]", frozenset(texts["scopes"].split())),
            priority=cast("Priority", texts["priority"]),
            models=frozenset(texts["models"].split()),
            limits=Limits(**{item.name: _number(texts, item.name) for item in fields(Limits)}),
            created_at=int(texts["created_ms"]) / 1000,
            expires_at=_time(texts, "expires_ms"),
            revoked_at=_time(texts, "revoked_ms"),
            old_secret_until=_time(texts, "old_until_ms"),
        )
    except (KeyError, ValueError) as error:
        raise MessageError(f"API key: its record cannot be read: {error!r}") from None
    record.check()
    return record


def _words(names: frozenset[Scope] | frozenset[str]) -> str:
    return " ".join(sorted(names))


def _number(texts: Mapping[str, str], name: str) -> int | None:
    text = texts.get(name, "")  # a limit that an older version did not know
    return int(text) if text else None


def _time(texts: Mapping[str, str], name: str) -> float | None:
    ms = _number(texts, name)
    return None if ms is None else ms / 1000
