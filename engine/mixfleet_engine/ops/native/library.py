"""The door to the compiled C library: its functions, its structures, and whether it works here."""

import ctypes
import functools
import logging
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, Final

# Torch first: its OpenMP runtime is then the one that the library finds, with one pool of threads.
import torch

from mixfleet_engine.errors import NativeUnavailableError
from mixfleet_engine.ops.native.build import library_path

logger = logging.getLogger(__name__)

ABI_VERSION: Final = 1
"""Of structures and functions; the C side has the same number in ``mf_abi.h``."""


class MatrixStruct(Structure):
    """``struct mf_matrix``."""

    _fields_ = (
        ("format", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("values", c_void_p),
        ("scales", c_void_p),
    )


class SourceStruct(Structure):
    """``struct mf_source``."""

    _fields_ = (
        ("format", c_int32),
        ("gate_up", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("values", c_void_p),
        ("scales", c_void_p),
    )


class OutputStruct(Structure):
    """``struct mf_output``."""

    _fields_ = (("norm", c_void_p), ("norm_eps", c_float), ("matrix", POINTER(MatrixStruct)))


class MoeStruct(Structure):
    """``struct mf_moe``."""

    _fields_ = (
        ("num_experts", c_int64),
        ("top_k", c_int64),
        ("d", c_int64),
        ("f", c_int64),
        ("shared", c_int32),
        ("norm_eps", c_float),
        ("norm", c_void_p),
        ("gate", c_void_p),
        ("w13", POINTER(MatrixStruct)),
        ("w2", POINTER(MatrixStruct)),
    )


_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "mf_abi_version": (c_int32, ()),
    "mf_packed_n": (c_int64, (POINTER(SourceStruct),)),
    "mf_values_bytes": (c_int64, (POINTER(SourceStruct),)),
    "mf_scales_bytes": (c_int64, (POINTER(SourceStruct),)),
    "mf_pack_matrix": (None, (POINTER(SourceStruct), c_void_p, c_void_p, c_int32)),
    "mf_linear_scratch_bytes": (c_int64, (POINTER(MatrixStruct), c_int64)),
    "mf_linear": (
        None,
        (POINTER(MatrixStruct), c_void_p, c_int64, c_void_p, c_void_p, c_int32),
    ),
    "mf_output_scratch_bytes": (c_int64, (POINTER(OutputStruct), c_int64)),
    "mf_output_run": (
        None,
        (POINTER(OutputStruct), c_void_p, c_int64, c_void_p, c_void_p, c_int32),
    ),
    "mf_moe_scratch_bytes": (c_int64, (POINTER(MoeStruct), c_int64)),
    "mf_moe_run": (None, (POINTER(MoeStruct), c_void_p, c_int64, c_void_p, c_void_p, c_int32)),
}


class NativeLibrary:
    """The library, loaded and of the right version. Its functions are attributes of ``functions``.

    Raises:
        NativeUnavailableError: It cannot be loaded, lacks a function or is of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.functions = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                self.declare(name, result, arguments)
        except (OSError, AttributeError) as error:
            raise NativeUnavailableError(f"{path} does not load: {error}") from error
        version = self.functions.mf_abi_version()
        if version != ABI_VERSION:
            raise NativeUnavailableError(f"{path} is version {version}, wanted {ABI_VERSION}")

    def declare(self, name: str, result: Any, arguments: tuple[Any, ...]) -> None:
        """Say what a function takes and returns.

        Raises:
            AttributeError: There is no such function.
        """
        function = getattr(self.functions, name)
        function.restype, function.argtypes = result, arguments


def load_native() -> NativeLibrary:
    """Return the library of this machine, compiled if need be, and checked.

    Raises:
        NativeUnavailableError: It cannot be had here; the text says why.
    """
    found = _found()
    if isinstance(found, NativeUnavailableError):
        raise found
    return found


@functools.cache
def _found() -> NativeLibrary | NativeUnavailableError:
    """Return the library or why there is none: a compiler that fails is asked once."""
    # The check packs matrices and multiplies, and those modules need this one.
    from mixfleet_engine.ops.native.self_check import check

    try:
        library = NativeLibrary(library_path())
        check(library)
    except NativeUnavailableError as error:
        return error
    logger.info("native CPU back-end: %s, torch %s", library.path, torch.__version__)
    return library
