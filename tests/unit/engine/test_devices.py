from dataclasses import dataclass

import pytest
import torch

from mixfleet_engine import devices
from mixfleet_engine.devices import found_machine, machine_of, measured_free_bytes, torch_facts
from mixfleet_engine.host_memory import HostMemory

GIB = 1 << 30
CPU = torch.device("cpu")


@dataclass
class FakeGpus:
    """Free and total memory in GiB per device."""

    memory: list[tuple[int, int]]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def mem_get_info(device: torch.device) -> tuple[int, int]:
            free, total = self.memory[device.index]
            return free * GIB, total * GIB

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(self.memory))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.memory))
        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


@pytest.fixture
def cpu_of_24_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(total_bytes=24 * GIB, available_bytes=20 * GIB)
    monkeypatch.setattr(devices, "host_memory", lambda: memory)


@pytest.mark.usefixtures("cpu_of_24_gib")
def test_a_cpu_has_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpus([]).install(monkeypatch)
    found = found_machine()
    assert found == machine_of(CPU)
    assert (found.label, found.memory_bytes, found.available_bytes) == ("cpu", 24 * GIB, 20 * GIB)


@pytest.mark.usefixtures("cpu_of_24_gib")
def test_ranks_on_one_cpu_share_its_memory() -> None:
    found = machine_of(CPU, world=4)
    assert (found.num_devices, found.memory_bytes, found.available_bytes) == (4, 6 * GIB, 5 * GIB)


def test_a_gpu_of_a_group_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpus([(79, 80), (60, 80)]).install(monkeypatch)
    found = machine_of(torch.device("cuda", 1), world=2)
    assert found.label == "2x GPU 1"
    assert (found.memory_bytes, found.available_bytes) == (80 * GIB, 60 * GIB)


def test_a_group_is_as_good_as_its_smallest_and_fullest_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeGpus([(30, 80), (47, 48), (79, 80)]).install(monkeypatch)
    found = found_machine()
    assert found.label == "3x GPU 1"
    assert (found.memory_bytes, found.available_bytes) == (48 * GIB, 30 * GIB)


def test_free_after_loading_is_the_devices_and_what_torch_holds_but_does_not_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    FakeGpus([(30, 80), (11, 80)]).install(monkeypatch)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *given, n=name: called.append((n, *given)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (50 + device.index) * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 48 * GIB)
    device = torch.device("cuda", 1)
    assert measured_free_bytes(device) == (11 + 51 - 48) * GIB
    assert called == [("synchronize", device), ("empty_cache",)]
    assert measured_free_bytes(CPU) is None


def test_facts_are_torchs_own() -> None:
    facts = torch_facts()
    assert facts.version == torch.__version__
    assert facts.threads == torch.get_num_threads()
    assert facts.num_cores >= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_real_gpu_has_free_memory() -> None:
    found = found_machine()
    assert found.kind == "cuda"
    assert 0 < found.available_bytes <= found.memory_bytes
