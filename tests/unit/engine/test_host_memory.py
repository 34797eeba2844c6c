import os
from pathlib import Path

import pytest

from mixfleet_engine.host_memory import HostMemory, host_memory

GIB = 1 << 30
UNLIMITED_V1 = 9223372036854771712


class FakeHost:
    """The files of a machine of 64 GiB, 40 of them available."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.cgroups = root / "cgroup"
        self.write("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable:   {40 << 20} kB\n")

    def write(self, path: str, text: object) -> None:
        file = self.proc.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def read(self) -> tuple[float, float]:
        """Return total and available in GiB."""
        found = host_memory(self.proc, self.cgroups)
        return found.total_bytes / GIB, found.available_bytes / GIB


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


def test_without_cgroups_the_kernels_own_figures_count(host: FakeHost) -> None:
    assert host.read() == (64, 40)


def test_a_limit_of_a_cgroup_is_the_total(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/job")
    host.write("cgroup/job/memory.max", 16 * GIB)
    host.write("cgroup/job/memory.current", 6 * GIB)
    assert host.read() == (16, 10)


def test_pages_of_files_are_as_good_as_free(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/job")
    host.write("cgroup/job/memory.max", 16 * GIB)
    host.write("cgroup/job/memory.current", 6 * GIB)
    stat = f"anon 5\ninactive_file {2 * GIB}\nactive_file {GIB}\nfile {4 * GIB}"
    host.write("cgroup/job/memory.stat", stat)
    assert host.read() == (16, 13)


def test_a_limit_above_the_machine_changes_nothing(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/job")
    host.write("cgroup/job/memory.max", 128 * GIB)
    host.write("cgroup/job/memory.current", GIB)
    assert host.read() == (64, 40)


def test_no_limit_is_no_limit(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/job")
    host.write("cgroup/job/memory.max", "max")
    host.write("cgroup/job/memory.current", 30 * GIB)
    assert host.read() == (64, 40)


def test_the_tightest_limit_above_the_process_counts(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/user/job")
    host.write("cgroup/user/job/memory.max", 32 * GIB)
    host.write("cgroup/user/job/memory.current", 31 * GIB)
    host.write("cgroup/user/memory.max", 20 * GIB)
    host.write("cgroup/user/memory.current", 0)
    assert host.read() == (20, 1)


def test_in_a_container_the_mounted_root_is_its_own_cgroup(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/")
    host.write("cgroup/memory.max", 8 * GIB)
    host.write("cgroup/memory.current", 2 * GIB)
    assert host.read() == (8, 6)


def test_a_path_that_only_the_host_sees_leads_to_the_mounted_root(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "9:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/docker/1f")
    host.write("cgroup/memory/memory.limit_in_bytes", 8 * GIB)
    host.write("cgroup/memory/memory.usage_in_bytes", 5 * GIB)
    host.write("cgroup/memory/memory.stat", f"inactive_file 7\ntotal_inactive_file {GIB}")
    assert host.read() == (8, 4)


def test_version_1_says_unlimited_with_a_large_number(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "4:memory:/")
    host.write("cgroup/memory/memory.limit_in_bytes", UNLIMITED_V1)
    host.write("cgroup/memory/memory.usage_in_bytes", GIB)
    assert host.read() == (64, 40)


def test_a_cgroup_above_its_limit_has_nothing_left(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/job")
    host.write("cgroup/job/memory.max", 4 * GIB)
    host.write("cgroup/job/memory.current", 5 * GIB)
    assert host.read() == (4, 0)


def test_files_that_are_not_as_expected_are_passed_over(host: FakeHost) -> None:
    host.write("proc/self/cgroup", "0::/job")
    host.write("cgroup/job/memory.max", "a lot")
    (host.cgroups / "job" / "memory.current").write_bytes(b"\xff\xfe")
    assert host.read() == (64, 40)


def test_a_system_without_these_files_counts_all_its_memory(tmp_path: Path) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = host_memory(tmp_path / "proc", tmp_path / "cgroup")
    assert found == HostMemory(total_bytes=total, available_bytes=total)


def test_this_machine_has_memory_and_this_process_may_have_some() -> None:
    found = host_memory()
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < found.available_bytes <= found.total_bytes <= physical
