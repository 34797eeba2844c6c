import ctypes
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixfleet_engine.errors import NativeUnavailableError
from mixfleet_engine.ops.native import library as native_library_module
from mixfleet_engine.ops.native.build import SOURCES
from mixfleet_engine.ops.native.library import ABI_VERSION, NativeLibrary
from mixfleet_engine.ops.native.self_check import check
from support.native_cases import native_library


def test_the_library_is_loaded_once() -> None:
    assert native_library() is native_library()


def test_where_there_is_no_library_the_reason_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> Path:
        raise NativeUnavailableError("this CPU has no avx512_bf16")

    monkeypatch.setattr(native_library_module, "library_path", refuse)
    native_library_module._found.cache_clear()
    try:
        with pytest.raises(pytest.skip.Exception, match=r"^this CPU has no avx512_bf16$"):
            native_library()
    finally:
        native_library_module._found.cache_clear()


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.so"
    path.write_text("not a library")
    with pytest.raises(NativeUnavailableError, match=r"broken\.so does not load"):
        NativeLibrary(path)


def test_both_sides_have_the_same_version() -> None:
    (found,) = re.findall(r"#define MF_ABI_VERSION (\d+)", (SOURCES / "mf_abi.h").read_text())
    assert int(found) == ABI_VERSION


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = native_library().path
    monkeypatch.setattr(native_library_module, "ABI_VERSION", ABI_VERSION + 1)
    with pytest.raises(
        NativeUnavailableError, match=f"is version {ABI_VERSION}, wanted {ABI_VERSION + 1}"
    ):
        NativeLibrary(path)


def test_a_library_that_lacks_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = native_library().path
    more = {**native_library_module._SIGNATURES, "mf_nothing": (None, ())}
    monkeypatch.setattr(native_library_module, "_SIGNATURES", more)
    with pytest.raises(NativeUnavailableError, match="mf_nothing"):
        NativeLibrary(path)


class BrokenFunctions:
    """The real functions, but every product ends in something else."""

    def __init__(self, functions: Any, spoil: float) -> None:
        self._functions = functions
        self._spoil = spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def mf_linear(self, matrix: Any, x: int, num_rows: int, out: int, *rest: Any) -> None:
        self._functions.mf_linear(matrix, x, num_rows, out, *rest)
        (torch.frombuffer(floats_at(out), dtype=torch.float32)).mul_(self._spoil)


def floats_at(address: int) -> Any:
    return (ctypes.c_char * 4).from_address(address)


@pytest.mark.parametrize("spoil", [1.5, float("nan")])
def test_a_library_that_multiplies_wrongly_is_refused(spoil: float) -> None:
    right = native_library()
    check(right)
    broken: Any = SimpleNamespace(
        path=right.path, functions=BrokenFunctions(right.functions, spoil)
    )
    with pytest.raises(NativeUnavailableError, match="multiplies wrongly in bf16: off by"):
        check(broken)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
def test_torch_and_the_library_share_one_pool_of_threads() -> None:
    native_library()
    # In a process of its own: other libraries of this one may bring other pools.
    program = (
        "from mixfleet_engine.ops.native.library import load_native\n"
        "load_native()\n"
        "print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    mapped = {line.split()[-1] for line in maps.splitlines() if re.search("lib[gi]?omp", line)}
    assert len(mapped) == 1
