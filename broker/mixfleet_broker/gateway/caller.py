"""Who asks: API keys, their scopes and limits, and what they owe."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_address
from typing import Final

from starlette.requests import Request

from mixfleet_broker.api_keys import ApiKeys, any_keys
from mixfleet_broker.errors import BrokerError, MixfleetError, UnknownKeyError
from mixfleet_broker.gateway.api_errors import ApiError, as_api_error
from mixfleet_broker.gateway.cached import Cached
from mixfleet_broker.gateway.fleet import Fleet
from mixfleet_broker.gateway.watch import JobObserver, WatchedJob
from mixfleet_broker.key_cache import KeyCache
from mixfleet_broker.key_records import KeyRecord, Limits, Scope
from mixfleet_broker.limits import Admission, KeyLimits, LimitState, rules_for
from mixfleet_broker.messages import new_job_id
from mixfleet_broker.settings import Settings
from mixfleet_broker.terms import QueueRules

logger = logging.getLogger(__name__)

_OPEN_FOR_S: Final = 1.0
"""How long after the first key was made an open gateway may stay open."""
_HEADER_NAMES: Final = {"requests": "requests", "tokens": "tokens", "tokens_day": "tokens-day"}


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request."""

    tenant: str
    """Whose its jobs are."""
    record: KeyRecord | None = None
    """None on a gateway that asks for no key."""

    @property
    def name(self) -> str:
        """For logs: never the secret."""
        return self.tenant if self.record is None else self.record.key_id

    def rules(self, rules: QueueRules) -> QueueRules:
        """Return the limits of the queue for this caller."""
        return rules if self.record is None else rules_for(self.record, rules)

    def check_model(self, model: str) -> None:
        """Raise unless the caller may use the model."""
        if self.record is not None and not self.record.may_use_model(model):
            raise ApiError(
                403,
                f"this key may not use the model {model[:80]!r}",
                kind="permission_error",
                code="model_not_allowed",
                param="model",
            )

    def owns(self, tenant: str) -> bool:
        """Whether the caller may see and change what is a tenant's."""
        return self.record is None or tenant == self.tenant or "admin" in self.record.scopes

    def check_owner(self, tenant: str, job_id: str) -> None:
        """Raise, as if there were no such job, unless it is the caller's own."""
        if not self.owns(tenant):
            raise ApiError(
                404,
                f"no job {job_id}: it never existed, or it ended too long ago",
                code="unknown_job",
            )


class Gatekeeper(JobObserver):
    """Tells callers apart and counts what they use. Made in the gateway's event loop.

    Args:
        fleet: Where keys are kept.
        settings: Whether keys are asked for.
    """

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self._fleet = fleet
        self._settings = settings
        self._keys = ApiKeys(fleet.redis, prefix=fleet.prefix)
        self._cache = KeyCache(self._keys.find)
        self._limits = KeyLimits(fleet.redis, prefix=fleet.prefix)
        self._any_keys: Cached[bool] = Cached(partial(fleet.with_redis, any_keys), _OPEN_FOR_S)
        self._charged: dict[str, KeyRecord] = {}
        self._settling: set[asyncio.Future[int]] = set()

    async def needs_key(self) -> bool:
        """Whether callers must show a key."""
        if self._settings.require_key or not is_loopback(self._settings.listen):
            return True
        return await self._any_keys.get()

    async def caller(
        self, request: Request, scope: Scope = "chat", secret: str | None = None
    ) -> Caller:
        """Return who sent the request.

        Args:
            request: Its ``Authorization: Bearer`` or ``x-api-key`` header is the secret.
            scope: What the key must allow.
            secret: The secret, where it came otherwise.

        Raises:
            ApiError: 401 without a good key, 403 with one that does not allow this.
        """
        if not await self.needs_key():
            return Caller(self._settings.tenant)
        shown = secret or _shown_secret(request)
        if not shown:
            raise ApiError(
                401,
                "an API key is needed: `Authorization: Bearer mf-...`; `mixfleet key create` "
                "makes one",
                kind="authentication_error",
                code="missing_api_key",
            )
        return self.caller_of(await self._fleet.call(self._cache.find, shown), scope)

    def caller_of(self, record: KeyRecord | None, scope: Scope = "chat") -> Caller:
        """Return who has a key that was found, None if none was.

        Raises:
            ApiError: As :meth:`caller`.
        """
        if record is None or record.is_expired(time.time()):
            raise ApiError(
                401,
                "this API key is not valid: it was never made, is revoked or has expired",
                kind="authentication_error",
                code="invalid_api_key",
            )
        if scope not in record.scopes and "admin" not in record.scopes:
            raise ApiError(
                403,
                f"this key does not have the scope {scope!r}",
                kind="permission_error",
                code="scope_missing",
            )
        return Caller(record.tenant or record.key_id, record)

    async def charge(self, caller: Caller, job_ids: Sequence[str], tokens: int) -> Admission | None:
        """Charge a request to its key; None where no key has limits.

        Raises:
            ApiError: A limit is reached: 429 with the numbers and the time to wait.
        """
        record = caller.record
        if record is None:
            return None
        admission = await self._admit(record, job_ids, tokens)
        self._charged.update(dict.fromkeys(job_ids, record))
        return admission

    async def _admit(self, record: KeyRecord, job_ids: Sequence[str], tokens: int) -> Admission:
        try:
            return await self._fleet.call(self._limits.admit, record, job_ids, tokens)
        except MixfleetError as error:
            refusal = as_api_error(error)
            states = getattr(error, "states", ())
            raise refusal.with_headers(rate_limit_headers(states)) from error

    async def charge_request(self, caller: Caller) -> dict[str, str]:
        """Charge a request that queues no job to its key's requests a minute, and to nothing else.

        Returns:
            Headers for its answer; none where no key has limits.

        Raises:
            ApiError: As :meth:`charge`.
        """
        record = caller.record
        if record is None or record.limits.requests_per_min is None:
            return {}
        limits = Limits(requests_per_min=record.limits.requests_per_min)
        counted = await self._admit(replace(record, limits=limits), [new_job_id()], 0)
        return rate_limit_headers(counted.states)

    def expect(self, caller: Caller, job_ids: Sequence[str]) -> None:
        """Settle jobs at their ends that another gateway has charged to the caller's key."""
        if caller.record is not None:
            self._charged.update(dict.fromkeys(job_ids, caller.record))

    async def payer(self, tenant: str, key_id: str) -> Caller:
        """Return who pays for what goes on without a request.

        Args:
            tenant: Whose it is.
            key_id: Of the API key that it was asked for with; empty where there was none.

        Raises:
            ApiError: 401, the key is not valid any more.
        """
        if not key_id:
            return Caller(tenant)
        try:
            record = await self._fleet.call(self._keys.get, key_id)
        except UnknownKeyError:
            return self.caller_of(None)
        return self.caller_of(None if record.revoked_at is not None else record)

    async def refund(self, caller: Caller, admission: Admission | None) -> None:
        """Give back all of a request that was not taken."""
        if caller.record is None or admission is None:
            return
        for job_id in admission.job_ids:
            self._charged.pop(job_id, None)
        try:
            await self._fleet.call(self._limits.refund, caller.record, admission)
        except BrokerError as error:
            logger.warning("not_refunded key=%s error=%s", caller.name, error)

    def ended(self, job: WatchedJob) -> None:
        """Give back what a job was charged and did not use."""
        record = self._charged.pop(job.job_id, None)
        if record is None:
            return
        usage = job.end.usage if job.end is not None else None
        known = job.num_tokens + (job.num_prompt_tokens or 0)
        used = usage.prompt_tokens + usage.completion_tokens if usage is not None else known
        settling = asyncio.ensure_future(
            self._fleet.call(self._limits.settle, record, {job.job_id: used})
        )
        self._settling.add(settling)
        settling.add_done_callback(self._settled)

    async def settled(self) -> None:
        """Wait until all jobs that have ended so far are settled, or could not be."""
        if self._settling:
            await asyncio.wait(set(self._settling))

    def _settled(self, settling: "asyncio.Future[int]") -> None:
        self._settling.discard(settling)
        if not settling.cancelled() and settling.exception() is not None:
            logger.warning("not_settled error=%s", settling.exception())


def rate_limit_headers(states: Sequence[LimitState]) -> dict[str, str]:
    """Return ``x-ratelimit-*`` as OpenAI's clients know them."""
    headers = {}
    for state in states:
        name = _HEADER_NAMES.get(state.name)
        if name is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(state.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(state.remaining)
            headers[f"x-ratelimit-reset-{name}"] = f"{state.reset_s:.3f}s"
    return headers


def is_loopback(listen: str) -> bool:
    """Whether nobody but this machine can reach a ``HOST:PORT``."""
    host = listen.rpartition(":")[0]
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _shown_secret(request: Request) -> str:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return secret.strip()
    return request.headers.get("x-api-key", "").strip()
