"""Log lines as JSON objects, for whoever collects and searches them.

Events are logged as ``logger.info("job_left job_id=%s", job_id)``. What the template names
``job_id=%s`` becomes a field with its own type; the rest of the text is the event.
"""

import json
import logging
import re
from datetime import UTC, datetime
from typing import Any, Final

_PART: Final = re.compile(r"(?:(\w+)=)?(%[-#0 +]*\d*(?:\.\d+)?[a-zA-Z])|%%")
_TIME_NAME: Final = re.compile(r"_m?s$")
_RESERVED: Final = frozenset({"time", "level", "logger", "event", "exception"})


class JsonFormatter(logging.Formatter):
    """Writes a record as one line: time, level, logger, event, and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        event, fields = _split(record)
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event,
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _split(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """Return the event's text and its fields."""
    args = record.args
    if not isinstance(record.msg, str) or not isinstance(args, tuple) or not args:
        return record.getMessage(), {}
    left, fields = list(args), {}
    pieces, end = [], 0
    for part in _PART.finditer(record.msg):
        pieces.append(record.msg[end : part.start()])
        end = part.end()
        name, spec = part.groups()
        if spec is None:
            pieces.append("%")
            continue
        value = left.pop(0)
        if name is None or name in _RESERVED:
            pieces.append(part[0] % value)
        else:
            fields[name] = _value(name, spec, value)
    text = " ".join("".join([*pieces, record.msg[end:]]).split())
    return text.replace(" :", ":").replace(" ,", ","), fields


def _value(name: str, spec: str, value: object) -> Any:
    """Return a field's value: numbers as numbers, rounded as the text would be."""
    if value is None or value == "-":
        return None
    if isinstance(value, float):
        return float(spec % value)
    if isinstance(value, bool | int):
        return value
    text = str(value)
    if _TIME_NAME.search(name):
        try:
            return float(text)
        except ValueError:
            return text
    return text
