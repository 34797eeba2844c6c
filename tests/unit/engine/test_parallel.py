"""What can be said of a group without one; real groups are in `engine_oracle` and `e2e`."""

import ast
import inspect
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixfleet_engine.config import Shard
from mixfleet_engine.errors import ConfigError, StartHangError
from mixfleet_engine.parallel import TensorParallel, rank_device
from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_worker.group import RankGroup

PACKAGES = [Path(inspect.getfile(found)).parent for found in (TensorParallel, RankGroup)]


def place(rank: int, port: int, *, is_hosted: bool = False) -> Rendezvous:
    return Rendezvous(
        shard=Shard(rank=rank, world=2),
        local_rank=rank,
        host="127.0.0.1",
        port=port,
        is_hosted=is_hosted,
    )


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody listens and that nobody else gets meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("is_hosted", "named"),
    [(False, "rank 0 hangs in stage 'started'"), (True, "^torchrun does not answer")],
)
def test_nobody_at_the_rendezvous_is_named_after_the_patience(
    is_hosted: bool, named: str, closed_port: int
) -> None:
    with pytest.raises(StartHangError, match=rf"{named}.*{closed_port}: tried for 0.2 s"):
        TensorParallel.connect(place(1, closed_port, is_hosted=is_hosted), "cpu", patience_s=0.2)


def test_a_port_that_somebody_has_is_named(taken_port: int) -> None:
    with pytest.raises(ConfigError, match=rf"rank 0 cannot listen at 127\.0\.0\.1:{taken_port}"):
        TensorParallel.connect(place(0, taken_port), "cpu", patience_s=0.2)


@pytest.mark.parametrize(
    ("setting", "has_cuda", "device"),
    [
        ("auto", False, "cpu"),
        ("auto", True, "cuda:3"),
        ("cuda", True, "cuda:3"),
        ("cpu", True, "cpu"),
    ],
)
def test_each_rank_has_the_device_of_its_number(
    setting: str, has_cuda: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert rank_device(setting, 3) == device


def test_a_rank_without_a_device_is_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"rank 2 of this machine .* the machine has 2"):
        rank_device("cuda", 2)


def test_one_device_cannot_be_everybodys() -> None:
    with pytest.raises(ConfigError, match="device='cuda:1'"):
        rank_device("cuda:1", 0)


def test_torch_distributed_stays_in_two_files() -> None:
    files = [file for package in PACKAGES for file in package.rglob("*.py")]
    users = {file.name for file in files if any(map(_is_distributed, _imported(file)))}
    assert users == {"parallel.py", "symmetric_memory.py"}


def _is_distributed(name: str) -> bool:
    return name.startswith("torch.") and "distributed" in name


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
