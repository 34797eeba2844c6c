import pytest

from mixfleet_engine.config import Shard
from mixfleet_engine.errors import ConfigError
from mixfleet_engine.rendezvous import Rendezvous

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_a_rank_is_what_torchrun_says() -> None:
    assert Rendezvous.from_environment(TORCHRUN) == Rendezvous(
        shard=Shard(rank=3, world=4),
        local_rank=1,
        host="127.0.0.1",
        port=29500,
        is_hosted=True,
        attempt="2",
    )


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_process_with_half_of_the_variables_is_on_its_own(missing: str) -> None:
    assert Rendezvous.from_environment(TORCHRUN | {missing: ""}) is None
    assert Rendezvous.from_environment({k: v for k, v in TORCHRUN.items() if k != missing}) is None


def test_a_group_of_one_is_no_group() -> None:
    assert Rendezvous.from_environment(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}) is None


def test_on_one_machine_the_local_rank_may_be_left_out() -> None:
    without = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"}
    found = Rendezvous.from_environment(without)
    assert found is not None
    assert found.local_rank == 3


@pytest.mark.parametrize("is_hosted", [False, True])
def test_what_is_said_to_a_process_is_what_it_reads(is_hosted: bool) -> None:
    place = Rendezvous(
        shard=Shard(rank=1, world=2),
        local_rank=1,
        host="127.0.0.1",
        port=4711,
        is_hosted=is_hosted,
    )
    assert Rendezvous.from_environment(place.as_environment()) == place


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": "one"}, "RANK='one'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"RANK": "4"}, "rank=4"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "world=0"),
    ],
)
def test_variables_that_make_no_sense_are_named(changes: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Rendezvous.from_environment(TORCHRUN | changes)
