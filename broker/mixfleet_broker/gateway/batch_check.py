"""What must be true of a batch's file as a whole before its first line is run."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

from mixfleet_broker.gateway.batch_requests import LineError, read_lines, read_value

MAX_ERRORS: Final = 100
"""Of a batch that are told one by one."""


@dataclass(slots=True)
class FileCheck:
    """What was found."""

    total: int = 0
    """Lines that are not blank."""
    num_errors: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    """The first of them, as OpenAI's batch errors."""

    def refuse(self, code: str, message: str, *, line: int | None, param: str | None) -> None:
        """Note an error."""
        self.num_errors += 1
        if len(self.errors) < MAX_ERRORS:
            error = {"code": code, "message": message, "line": line, "param": param}
            self.errors.append(error)

    def fields(self) -> dict[str, str]:
        """Return what is kept of it in the batch's record."""
        errors = list(self.errors)
        if self.num_errors > len(errors):
            text = f"and {self.num_errors - len(errors)} more errors"
            errors.append({"code": "more_errors", "message": text, "line": None, "param": None})
        return {"total": str(self.total), "errors": json.dumps(errors)}


async def check_file(
    read: Callable[[int, int], Awaitable[bytes]], *, max_line_bytes: int, max_lines: int
) -> FileCheck:
    """Count the lines and look for custom ids that stand twice.

    A line that is bad by itself is none of the file's errors: it gets its own. Of each custom id
    only a digest is held.
    """
    found, seen = FileCheck(), dict[int, int]()
    async for line in read_lines(read, max_line_bytes):
        found.total += 1
        try:
            custom_id, _ = read_value(line, max_line_bytes)
        except LineError:
            continue
        if custom_id is None:
            continue
        first = seen.setdefault(_digest(custom_id), line.place)
        if first != line.place:
            text = f"custom_id {custom_id[:80]!r} of line {line.place + 1} is that of line "
            text += f"{first + 1}: each must be unique"
            found.refuse("duplicate_custom_id", text, line=line.place + 1, param="custom_id")
    if found.total == 0:
        found.refuse("empty_file", "the file holds no request", line=None, param=None)
    if found.total > max_lines:
        text = f"the file has {found.total} lines, the limit is {max_lines}"
        found.refuse("too_many_lines", text, line=None, param=None)
    return found


def _digest(custom_id: str) -> int:
    digest = blake2b(custom_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
