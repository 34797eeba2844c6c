import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mixfleet_engine.errors import NativeUnavailableError
from mixfleet_engine.ops.native import build
from mixfleet_engine.ops.native.build import CPU_FLAGS, library_path

FLAGS = " ".join(CPU_FLAGS)


@pytest.fixture
def cpu_info(tmp_path: Path) -> Path:
    """A CPU that has all it needs."""
    return write_cpu(tmp_path / "cpuinfo", FLAGS)


def write_cpu(path: Path, flags: str, model: str = "One") -> Path:
    path.write_text(f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: fpu {flags}\n\n")
    return path


def write_compiler(path: Path, version: str = "fake 1.0", *, action: str = "") -> str:
    """Make a command that logs its calls and writes ``library`` where ``-o`` says."""
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n'
        f'echo called >> "{path}.log"\n'
        f"{action}\n"
        'while [ "$1" != -o ]; do shift; done\n'
        'echo library > "$2"\n'
    )
    path.chmod(0o755)
    return str(path)


def num_calls(compiler: str) -> int:
    log = Path(f"{compiler}.log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_the_second_call_compiles_nothing(
    tmp_path: Path, cpu_info: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler, folder = write_compiler(tmp_path / "cc"), tmp_path / "cache" / "native"
    with caplog.at_level(logging.INFO):
        first = library_path(folder=folder, compilers=[compiler], cpu_info=cpu_info)
    assert first.read_text() == "library\n"
    assert "compiling" in caplog.text
    assert compiler in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = library_path(folder=folder, compilers=[compiler], cpu_info=cpu_info)
    assert again == first
    assert num_calls(compiler) == 1
    assert caplog.text == ""
    assert list(folder.iterdir()) == [first]


def test_the_name_tells_compilers_cpus_flags_and_sources_apart(
    tmp_path: Path, cpu_info: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_compiler(tmp_path / "old")
    new = write_compiler(tmp_path / "new", "fake 2.0")
    other_cpu = write_cpu(tmp_path / "other", FLAGS, model="Two")
    names = [
        library_path(folder=tmp_path, compilers=[old], cpu_info=cpu_info).name,
        library_path(folder=tmp_path, compilers=[new], cpu_info=cpu_info).name,
        library_path(folder=tmp_path, compilers=[old], cpu_info=other_cpu).name,
    ]
    with monkeypatch.context() as patch:
        patch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
        names.append(library_path(folder=tmp_path, compilers=[old], cpu_info=cpu_info).name)
    sources = tmp_path / "sources"
    sources.mkdir()
    monkeypatch.setattr(build, "SOURCES", sources)
    for text in ("int a;", "int b;"):
        (sources / "a.c").write_text(text)
        names.append(library_path(folder=tmp_path, compilers=[old], cpu_info=cpu_info).name)
    assert len(set(names)) == 6


def test_processes_that_compile_at_once_never_see_half_a_library(
    tmp_path: Path, cpu_info: Path
) -> None:
    folder, go = tmp_path / "cache", tmp_path / "go"
    wait = f'touch "{tmp_path}/started.$$"; while [ ! -e "{go}" ]; do :; done'
    slow = write_compiler(tmp_path / "cc", action=wait)
    found: list[Path] = []

    def compile_once() -> None:
        found.append(library_path(folder=folder, compilers=[slow], cpu_info=cpu_info))

    threads = [threading.Thread(target=compile_once) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("started.*"))) < 2 and time.monotonic() < deadline:
        pass
    assert len(list(folder.glob("*.tmp"))) == 2
    assert list(folder.glob("*.so")) == []
    go.touch()
    for thread in threads:
        thread.join(timeout=10)
    assert len(set(found)) == 1
    assert found[0].read_text() == "library\n"
    assert list(folder.iterdir()) == [found[0]]


def test_a_missing_compiler_is_named(tmp_path: Path, cpu_info: Path) -> None:
    with pytest.raises(NativeUnavailableError, match=r"no C compiler \(nothing-1, nothing-2\)"):
        library_path(folder=tmp_path, compilers=["nothing-1", "nothing-2"], cpu_info=cpu_info)


def test_the_first_compiler_that_is_there_is_taken(tmp_path: Path, cpu_info: Path) -> None:
    first, second = write_compiler(tmp_path / "a"), write_compiler(tmp_path / "b")
    library_path(folder=tmp_path, compilers=["nothing-1", first, second], cpu_info=cpu_info)
    assert (num_calls(first), num_calls(second)) == (1, 0)


def test_an_error_of_the_compiler_is_shown_and_leaves_nothing(
    tmp_path: Path, cpu_info: Path
) -> None:
    lines = "; ".join(f"echo 'line {number}' >&2" for number in range(9))
    folder = tmp_path / "cache"
    compiler = write_compiler(tmp_path / "cc", action=f"{lines}; exit 3")
    with pytest.raises(NativeUnavailableError, match="fails with code 3: line 0\nline 1") as caught:
        library_path(folder=folder, compilers=[compiler], cpu_info=cpu_info)
    assert "line 4" in str(caught.value)
    assert "line 5" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_compiler_that_does_not_run_is_an_error_with_a_reason(
    tmp_path: Path, cpu_info: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_bytes(b"\x7fELF nothing")
    broken.chmod(0o755)
    with pytest.raises(NativeUnavailableError, match="does not run"):
        library_path(folder=tmp_path, compilers=[str(broken)], cpu_info=cpu_info)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, cpu_info: Path) -> None:
    (tmp_path / "file").write_text("")
    compiler = write_compiler(tmp_path / "cc")
    with pytest.raises(NativeUnavailableError, match="file/native cannot be written"):
        library_path(folder=tmp_path / "file" / "native", compilers=[compiler], cpu_info=cpu_info)


def test_instructions_that_the_cpu_lacks_are_named(tmp_path: Path) -> None:
    old = write_cpu(tmp_path / "cpuinfo", "avx512f avx512bw avx512vl avx512dq")
    with pytest.raises(NativeUnavailableError, match="this CPU has no avx512_bf16, avx512_vnni"):
        library_path(folder=tmp_path, cpu_info=old)


def test_a_system_that_does_not_say_what_its_cpu_can_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NativeUnavailableError, match="does not say what its CPU can"):
        library_path(folder=tmp_path, cpu_info=tmp_path / "nothing")


@pytest.mark.slow
def test_nothing_is_compiled_at_import(tmp_path: Path) -> None:
    modules = ("build", "library", "linear", "moe", "output")
    imports = "; ".join(f"import mixfleet_engine.ops.native.{name}" for name in modules)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", imports], env=environment, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_libraries_are_kept_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder().name == "native"
    if sys.platform == "linux":
        assert build.cache_folder() == tmp_path / "mixfleet" / "native"


def test_the_sources_are_beside_the_module_and_would_be_in_a_wheel() -> None:
    names = {path.name for path in build.SOURCES.iterdir()}
    assert {"matrix.c", "moe.c", "mf_matrix.h"} <= names
    root = Path(__file__).parents[5]
    ignored = subprocess.run(
        ["git", "check-ignore", *build.SOURCES.glob("*.[ch]")],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert ignored.stdout == ""


@pytest.mark.slow
def test_the_sources_compile_without_a_warning() -> None:
    try:
        build.checked_cpu(build.CPU_INFO)
        compiler, _ = build.find_compiler(build.COMPILERS)
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    flags = [flag for flag in build.FLAGS if flag not in ("-O3", "-shared")]
    sources = [str(path) for path in sorted(build.SOURCES.glob("*.c"))]
    command = [compiler, *flags, "-O1", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *sources]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
