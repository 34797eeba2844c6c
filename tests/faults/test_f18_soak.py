"""F18: many jobs and all kinds of faults, by chance from a seed. Then every key is looked at."""

import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mixfleet import ChatStream, Client, new_job_id
from mixfleet.errors import BrokerError
from mixfleet_broker.queue import JobQueue
from support.fault_fleet import (
    MODEL,
    FaultWorker,
    Fleet,
    check_invariants,
    connect_client,
)
from support.invariants import Expected
from support.proxy import Proxy
from support.redis_server import UNSYNCED, RedisServer
from support.undisturbed import undisturbed_text

pytestmark = pytest.mark.slow

SEED = 18
TROUBLE_S = 10.0
TURN_S = 0.05
WORKER = ("--simulated", "--simulated-step-s", "0.01", "--max-batch-size", "4", "--stall-s", "2")


@dataclass
class Jobs:
    """What was asked, and what may have become of it."""

    client: Client
    chance: random.Random
    expected: dict[str, Expected] = field(default_factory=dict)
    streams: list[ChatStream] = field(default_factory=list)

    def ask(self) -> None:
        """Send one more; while Redis is away the same one again, later."""
        question, job_id = f"question {len(self.streams)}", new_job_id()
        max_tokens = self.chance.randint(1, 60)
        while True:
            try:
                stream = self.client.chat(
                    question, max_tokens=max_tokens, temperature=0.0, seed=1, job_id=job_id
                )
            except BrokerError:
                continue
            break
        self.streams.append(stream)
        text = undisturbed_text(question, max_tokens)
        # Three workers that happen to die on it make a job look like poison.
        states = frozenset({"finished", "failed"})
        self.expected[job_id] = Expected(text=text, states=states, code="worker_lost")

    def cancel(self) -> None:
        """Stop one of the last few."""
        stream = self.chance.choice(self.streams[-10:])
        known = self.expected[stream.job_id]
        self.expected[stream.job_id] = Expected(
            text=known.text, states=known.states | {"canceled"}, code=known.code
        )
        with suppress(BrokerError):  # whether it arrived or not, both is expected
            stream.cancel()


class Trouble:
    """What happens to the fleet, its network and its Redis."""

    def __init__(self, server: RedisServer, network: Proxy, fleet: Fleet) -> None:
        self._server = server
        self._network = network
        self._fleet = fleet
        self._paused: FaultWorker | None = None
        self.num = 0

    def turn(self, chance: random.Random) -> None:
        """Let something happen, or nothing."""
        acts = {
            0.010: self._restart_redis,
            0.025: self._network.reset,
            0.040: self._network.half_open,
            0.060: lambda: self._fleet.workers[0].kill(),
            0.080: lambda: self._fleet.workers[-1].terminate(),
            0.120: self._pause_or_resume,
        }
        drawn = chance.random()
        for limit, act in acts.items():
            if drawn < limit:
                act()
                self.num += 1
                return

    def end(self) -> None:
        """Let nothing happen any more."""
        self._network.loss = 0.0
        if self._paused is not None:
            self._paused.resume()

    def _restart_redis(self) -> None:
        self._server.kill()
        self._server.start()

    def _pause_or_resume(self) -> None:
        if self._paused is not None:
            self._paused.resume()
            self._paused = None
        else:
            self._paused = self._fleet.workers[len(self._fleet.workers) // 2]
            self._paused.pause()


def test_whatever_happens_no_job_is_lost_none_ends_twice_and_nothing_is_left_behind(
    tmp_path: Path,
) -> None:
    chance = random.Random(SEED)
    with (
        RedisServer(*UNSYNCED) as server,
        server.client() as redis,
        Proxy(server.socket, seed=SEED) as network,
        connect_client(server.url) as client,
    ):
        network.loss, network.delay_s = 0.01, 0.002
        is_over = False

        def start(name: str) -> FaultWorker:
            number = int(name.removeprefix("w"))
            url = network.url if number % 2 else server.url
            crashes = () if is_over else ("--crash-every", "400", "--seed", str(number))
            return FaultWorker(url, name, tmp_path, *WORKER, "--drain-s", "0.2", faults=crashes)

        with Fleet(start, size=3) as fleet:
            jobs, trouble = Jobs(client, chance), Trouble(server, network, fleet)
            deadline = time.monotonic() + TROUBLE_S
            while time.monotonic() < deadline:
                fleet.tend()
                jobs.ask()
                if chance.random() < 0.05:
                    jobs.cancel()
                trouble.turn(chance)
                time.sleep(TURN_S)
            trouble.end()
            is_over = True
            fleet.tend_until_ended(redis, jobs.expected, limit_s=60.0)
            check_invariants(redis, jobs.expected, limit_s=10.0)
        failed = sum(JobQueue(redis, MODEL).info(i).state == "failed" for i in jobs.expected)
    # Enough has gone wrong, and next to nobody has suffered from it.
    assert trouble.num >= 5
    assert fleet.num_deaths > 5
    assert failed <= len(jobs.expected) // 20
