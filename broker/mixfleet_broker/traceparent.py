"""W3C trace context: which trace a job belongs to, without any tracing library."""

import re
import sys
from typing import Final

_FORM: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


def valid_traceparent(text: str | None) -> str | None:
    """Return a ``traceparent`` as it came if it is one, else None: who sent a bad one has none."""
    found = _FORM.fullmatch(text or "")
    if found is None or not (int(found[1], 16) and int(found[2], 16)):
        return None
    return found[0]


def current_traceparent() -> str | None:
    """Return that of the span in which the caller is; None without one.

    A program that traces has imported OpenTelemetry by itself, and no other pays for it.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return None
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
