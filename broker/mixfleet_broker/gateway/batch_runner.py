"""Which batches this gateway drives: those that nobody drives, as far as it has room."""

import asyncio
import logging
from contextlib import suppress
from typing import Final
from uuid import uuid4

from mixfleet_broker.batch_store import BatchStore
from mixfleet_broker.errors import BrokerError
from mixfleet_broker.gateway.batch_driver import BatchDriver, NotOursError
from mixfleet_broker.gateway.service import Service

logger = logging.getLogger(__name__)

MAX_DRIVEN: Final = 8
"""Batches that one gateway drives at a time; the others wait, or go to other gateways."""
_LOOK_S: Final = 1.0
_BEAT_S: Final = 0.5


class BatchRunner:
    """One gateway's part in all batches. Made in the event loop; closed by :meth:`close`.

    Args:
        service: Where jobs go.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lease_s = service.settings.lease_s
        self._store = BatchStore(service.fleet.redis, prefix=service.fleet.prefix)
        self._driven: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._looking = asyncio.create_task(self._look())

    def wake(self) -> None:
        """Look at once: a batch was opened here."""
        self._wake.set()

    async def close(self) -> None:
        """Leave all batches to other gateways; what is queued goes on meanwhile."""
        tasks = [self._looking, *self._driven.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self) -> None:
        while True:
            try:
                await self._take()
            except BrokerError as error:
                logger.warning("batches_not_seen error=%s", error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _LOOK_S)
            self._wake.clear()

    async def _take(self) -> None:
        call = self._service.fleet.call
        for batch_id in await call(self._store.open_ids):
            if len(self._driven) >= MAX_DRIVEN:
                return
            if batch_id in self._driven:
                continue
            token = uuid4().hex
            lease = await call(self._store.lease, batch_id, token, self._lease_s)
            if lease is not None:
                self._driven[batch_id] = asyncio.create_task(self._drive(batch_id, token))

    async def _drive(self, batch_id: str, token: str) -> None:
        logger.info("batch_taken batch_id=%s", batch_id)
        try:
            batch = await self._service.fleet.call(self._store.find, batch_id)
            if batch is not None:
                await self._keep(BatchDriver(self._service, batch, token), batch_id, token)
        except NotOursError:
            logger.warning("batch_lost batch_id=%s", batch_id)
        except Exception:
            logger.exception("batch_failed batch_id=%s", batch_id)
            await asyncio.sleep(self._lease_s)  # so that it is not tried without a pause
        finally:
            del self._driven[batch_id]
            with suppress(BrokerError):
                await self._service.fleet.call(self._store.let_go, batch_id, token)

    async def _keep(self, driver: BatchDriver, batch_id: str, token: str) -> None:
        """Renew the lease while the batch is driven; raises what the driver raises."""
        beat_s = min(_BEAT_S, self._lease_s / 3)
        driving = asyncio.create_task(driver.run())
        try:
            while not driving.done():
                is_ours = await self._beat(driver, batch_id, token)
                await asyncio.wait({driving}, timeout=beat_s)
                if not is_ours and not driving.done():
                    raise NotOursError
            await driving
        finally:
            driving.cancel()
            await asyncio.gather(driving, return_exceptions=True)

    async def _beat(self, driver: BatchDriver, batch_id: str, token: str) -> bool:
        """Renew the lease; False if it is lost, or the batch has just ended."""
        call = self._service.fleet.call
        try:
            lease = await call(self._store.lease, batch_id, token, self._lease_s)
        except BrokerError as error:
            # Perhaps it is ours still. If not, the next write is refused.
            logger.warning("batch_not_renewed batch_id=%s error=%s", batch_id, error)
            return True
        if lease is not None:
            await driver.heard(lease)
        return lease is not None
