"""Checked reading of values that came from outside: types, ranges, and no field too many."""

import math
from typing import Final

from mixfleet_broker.errors import MessageError

MAX_DEPTH: Final = 8
"""Maps and lists inside each other; the schema needs four."""
NAMED_FIELDS: Final = 5
"""Unknown fields that an error text names; it counts the others."""


class Fields:
    """The fields of one map, each taken at most once.

    Args:
        value: What should be a map with text keys.
        where: The map's name in error texts.

    Raises:
        MessageError: ``value`` is no map.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise MessageError(f"{where}: must be a map, is {_kind(value)}")
        self._left: dict[object, object] = dict(value)
        self._where = where

    def take(self, name: str) -> object:
        """Return the field, or None where it is missing or null."""
        return self._left.pop(name, None)

    def done(self) -> None:
        """Check that no field is left.

        Raises:
            MessageError: One is; the text names it.
        """
        if self._left:
            names = ", ".join(sorted(repr(name)[:40] for name in self._left)[:NAMED_FIELDS])
            more = len(self._left) - NAMED_FIELDS
            others = f" and {more} more" if more > 0 else ""
            raise MessageError(f"{self._where}: unknown field {names}{others}")

    def text(self, name: str) -> str:
        """Return a field that must be text."""
        return text(self.take(name), self.name_of(name))

    def text_or_none(self, name: str) -> str | None:
        """Return a field that may be missing and must be text."""
        value = self.take(name)
        return None if value is None else text(value, self.name_of(name))

    def integer_or_none(self, name: str, low: int, high: int) -> int | None:
        """Return a field that may be missing and must be a whole number in ``[low, high]``."""
        value = self.take(name)
        return None if value is None else integer(value, self.name_of(name), low, high)

    def number_or_none(self, name: str, low: float, high: float) -> float | None:
        """Return a field that may be missing and must be a number in ``[low, high]``."""
        value = self.take(name)
        return None if value is None else number(value, self.name_of(name), low, high)

    def items(self, name: str) -> list[object]:
        """Return a field that may be missing, then empty, and must be a list."""
        value = self.take(name)
        return [] if value is None else items(value, self.name_of(name))

    def name_of(self, name: str) -> str:
        """Return the field's name for an error text."""
        return f"{self._where}.{name}" if self._where else name


def text(value: object, where: str) -> str:
    """Return ``value`` if it is text that UTF-8 can carry.

    Raises:
        MessageError: It is not.
    """
    if not isinstance(value, str):
        raise MessageError(f"{where}: must be text, is {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MessageError(f"{where}: holds a lone surrogate at {error.start}") from None
    return value


def integer(value: object, where: str, low: int, high: int) -> int:
    """Return ``value`` if it is a whole number in ``[low, high]``.

    Raises:
        MessageError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise MessageError(f"{where}: must be a whole number, is {_kind(value)}")
    if not low <= value <= high:
        raise MessageError(f"{where}={value}: must be from {low} to {high}")
    return value


def number(value: object, where: str, low: float, high: float) -> float:
    """Return ``value`` if it is a finite number in ``[low, high]``.

    Raises:
        MessageError: It is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise MessageError(f"{where}: must be a number, is {_kind(value)}")
    # The bounds come first: an int of a thousand digits is no float at all.
    if not low <= value <= high or not math.isfinite(value):
        raise MessageError(f"{where}={str(value)[:20]}: must be from {low:g} to {high:g}")
    return float(value)


def items(value: object, where: str) -> list[object]:
    """Return ``value`` as a list if it is a list or a tuple.

    Raises:
        MessageError: It is neither.
    """
    if not isinstance(value, list | tuple):
        raise MessageError(f"{where}: must be a list, is {_kind(value)}")
    return list(value)


def check_depth(value: object, limit: int = MAX_DEPTH) -> None:
    """Check that maps and lists lie at most ``limit`` deep inside each other.

    Raises:
        MessageError: They lie deeper.
    """
    level = [value]
    for _ in range(limit + 1):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list | tuple):
                inner.extend(item)
        if not inner:
            return
        level = inner
    raise MessageError(f"message: more than {limit} maps and lists inside each other")


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__
