"""A worker's look at its Redis before it loads anything: what is wrong is said at the start."""

import logging
from typing import Final

from mixfleet_broker.connection import connect
from mixfleet_broker.server_check import Level, check_server, refuse_unfit

logger = logging.getLogger(__name__)

_LOG_LEVELS: Final[dict[Level, int]] = {
    "ok": logging.INFO,
    "warning": logging.WARNING,
    "refuse": logging.ERROR,
}


def check_broker(redis_url: str, *, patience_s: float) -> None:
    """Wait for Redis, and log what is found, a line each.

    Raises:
        BrokerUnavailableError: It does not answer in time.
        ConfigError: It is not fit for a fleet.
    """
    with connect(redis_url, patience_s=patience_s) as redis:
        found = check_server(redis)
    for finding in found:
        logger.log(_LOG_LEVELS[finding.level], "broker %s: %s", finding.topic, finding.text)
    refuse_unfit(found, redis_url)
