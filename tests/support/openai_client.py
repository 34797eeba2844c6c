"""OpenAI's own client at a gateway, and what of its responses is looked at."""

import json
from typing import Any

from openai import AsyncOpenAI, OpenAI
from redis import Redis

from mixfleet_broker.keys import RESPONSE
from support.gateway import GatewayProcess
from support.worker_process import until

KEY = "none-needed"


def openai_client(gateway: GatewayProcess, key: str = KEY) -> OpenAI:
    """Return a client that does not try again: a refusal is to be seen."""
    return OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=30)


def async_openai_client(gateway: GatewayProcess) -> AsyncOpenAI:
    """Return the same for an event loop."""
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=30)


def job_id_of(response_id: str) -> str:
    return response_id.removeprefix("resp_")


def ended(client: OpenAI, response_id: str) -> Any:
    """The response, once it has ended."""
    found: list[Any] = []

    def has_ended() -> bool:
        found[:] = [client.responses.retrieve(response_id)]
        return found[0].status not in ("queued", "in_progress")

    until(has_ended, "the response ends")
    return found[0]


def has_final(redis: Redis, response_id: str) -> bool:
    record: Any = redis.get(RESPONSE(job_id_of(response_id)))
    return json.loads(record)["final"] is not None
