"""F16: workers and clients of two versions on one server, each with scripts of its own."""

from pathlib import Path
from typing import cast

import pytest
from redis import Redis

from mixfleet import Client
from mixfleet_broker import lua
from support.fault_fleet import SLOW_STEP, Asked, FaultWorker, check_invariants, connect_client
from support.worker_process import until

pytestmark = pytest.mark.slow

QUESTIONS = ("first question", "second question", "third question")
NEW = ("--script-version", "the next one")


def num_scripts(redis: Redis) -> int:
    return int(cast("dict[str, int]", redis.info("memory"))["number_of_cached_scripts"])


@pytest.mark.parametrize(
    ("order", "leaves"), [("upgrade", "drains"), ("upgrade", "dies"), ("downgrade", "dies")]
)
def test_the_answers_of_one_version_go_on_in_another(
    order: str, leaves: str, redis_url: str, redis: Redis, client: Client, tmp_path: Path
) -> None:
    redis.script_flush()
    versions: list[tuple[str, ...]] = [(), NEW] if order == "upgrade" else [NEW, ()]
    death = ("--die-at", "after-flush:6") if leaves == "dies" else ()
    flags = (*SLOW_STEP, "--drain-s", "0.1")
    with FaultWorker(redis_url, "one", tmp_path, *flags, faults=(*versions[0], *death)) as one:
        asked = Asked(client, *QUESTIONS)
        next(iter(asked.streams[0]))
        num_before = num_scripts(redis)
        with FaultWorker(redis_url, "other", tmp_path, *SLOW_STEP, faults=versions[1]):
            if leaves == "drains":
                one.terminate()
            until(lambda: one.is_dead, "the one version has left")
            results = asked.read_all()
            check_invariants(redis, asked.jobs)
            assert num_scripts(redis) >= num_before + 4
    assert {result.worker_ids for result in results} == {("one", "other")}


def test_a_client_of_another_version_is_served(
    redis_url: str, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultWorker(redis_url, "old", tmp_path, *SLOW_STEP):
        read = lua._read
        monkeypatch.setattr(lua, "_read", lambda name: f"{read(name)}-- a client's own\n")
        # What was made of the old text is remembered.
        for cached in (lua.script_text, lua.script_digest):
            monkeypatch.setattr(lua, cached.__name__, cached.__wrapped__)
        with connect_client(redis_url) as client:
            asked = Asked(client, *QUESTIONS)
            asked.read_all()
            check_invariants(redis, asked.jobs)
