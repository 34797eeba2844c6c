"""What a setting's value may be: how its text is read, checked and shown in ``--help``."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mixfleet_broker.redis_url import checked_redis_url

_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_NAME_REQUIREMENT: Final = (
    "must be 1 to 64 letters, digits, dots, dashes or underscores, and start with a letter or digit"
)
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
_LAST_PORT: Final = 65_535
_BYTES_PER_GIB: Final = 1 << 30
_MOST_GIB: Final = 1 << 30
"""More than any machine has, and still a number of bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One sort of value."""

    metavar: str
    """How ``--help`` shows it: N, SECONDS, a|b."""
    read: Callable[[object], object]
    """From a flag or variable (text) or a TOML value to the value in force; raises ValueError,
    whose text says what the value must be."""


def whole(*, at_least: int) -> Kind:
    """Whole numbers."""

    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError("must be a whole number")
        try:
            number = int(value)
        except ValueError:
            raise ValueError("must be a whole number") from None
        if number < at_least:
            raise ValueError(f"must be at least {at_least}")
        return number

    return Kind(metavar="N", read=read)


def whole_or_auto(*, at_least: int) -> Kind:
    """Whole numbers, or ``auto``, which reads as None: mixfleet chooses."""
    number = whole(at_least=at_least)

    def read(value: object) -> object:
        if isinstance(value, str) and value.lower() == "auto":
            return None
        try:
            return number.read(value)
        except ValueError as error:
            raise ValueError(f"{error}, or auto") from None

    return Kind(metavar="N|auto", read=read)


def seconds(*, at_least: float = -math.inf, above: float = -math.inf) -> Kind:
    """Lengths of time, fractions included."""

    def read(value: object) -> float:
        number = _finite(value, "must be a number of seconds")
        if number < at_least:
            raise ValueError(f"must be at least {at_least:g}")
        if number <= above:
            raise ValueError(f"must be more than {above:g}")
        return number

    return Kind(metavar="SECONDS", read=read)


def choice(*words: str) -> Kind:
    """One of a few words, in upper or lower case."""

    def read(value: object) -> str:
        word = _text(value).lower()
        if word not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return word

    return Kind(metavar="|".join(words), read=read)


def switch() -> Kind:
    """On or off."""
    words = {"on": True, "true": True, "yes": True, "1": True}
    words |= {"off": False, "false": False, "no": False, "0": False}

    def read(value: object) -> bool:
        if isinstance(value, bool):
            return value
        word = value.lower() if isinstance(value, str) else ""
        if word not in words:
            raise ValueError("must be on or off")
        return words[word]

    return Kind(metavar="on|off", read=read)


def text(pattern: str, requirement: str, *, metavar: str = "TEXT") -> Kind:
    """Text that matches ``pattern`` as a whole; ``requirement`` says the pattern in words."""
    compiled = re.compile(pattern)

    def read(value: object) -> str:
        word = _text(value)
        if not compiled.fullmatch(word):
            raise ValueError(requirement)
        return word

    return Kind(metavar=metavar, read=read)


def identifier() -> Kind:
    """Names of models and workers: they become parts of Redis keys."""
    return text(_NAME, _NAME_REQUIREMENT, metavar="NAME")


def listen_address() -> Kind:
    """A host's name or address, and a port."""

    def read(value: object) -> str:
        host, _, port = _text(value).rpartition(":")
        is_port = port.isascii() and port.isdigit() and int(port[:6]) <= _LAST_PORT
        if not _HOST.fullmatch(host) or not is_port:
            raise ValueError("must be HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000")
        return f"{host}:{int(port)}"

    return Kind(metavar="HOST:PORT", read=read)


def file_path() -> Kind:
    """Files and directories; ``~`` is the home directory, the result is absolute."""

    def read(value: object) -> Path:
        if isinstance(value, str) and not value:
            raise ValueError("must be a path")
        try:
            return Path(value if isinstance(value, Path) else _text(value)).expanduser().absolute()
        except RuntimeError:  # ~somebody who does not exist
            raise ValueError("must be in a home directory that exists") from None

    return Kind(metavar="PATH", read=read)


def redis_url() -> Kind:
    """URLs of Redis servers."""
    return Kind(metavar="URL", read=lambda value: checked_redis_url(_text(value)))


def gibibytes() -> Kind:
    """Amounts of memory, fractions included; at least one byte."""

    def read(value: object) -> float:
        number = _finite(value, "must be a number of GiB")
        if number * _BYTES_PER_GIB < 1:
            raise ValueError("must be more than 0")
        if number > _MOST_GIB:
            raise ValueError(f"must be at most {_MOST_GIB}")
        return number

    return Kind(metavar="GIB", read=read)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def _finite(value: object, requirement: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(requirement)
    try:
        number = float(value)
    except ValueError:
        raise ValueError(requirement) from None
    if not math.isfinite(number):
        raise ValueError(requirement)
    return number
