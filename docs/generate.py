"""Writes the tables of the docs from the code: ``python docs/generate.py``.

Text between ``<!-- generated: NAME -->`` and ``<!-- end -->`` is replaced.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mixfleet_broker import errors
from mixfleet_broker.gateway.metric_names import metrics_markdown
from mixfleet_broker.keys import KEYS
from mixfleet_broker.redis_url_options import options_markdown
from mixfleet_broker.settings import settings_markdown

DOCS = Path(__file__).parent
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def keys_markdown() -> str:
    """Return the table of all Redis keys."""
    lines = ["| key | type | written by | goes away | meaning |", "|---|---|---|---|---|"]
    lines += [
        f"| `{key.template}` | {key.type} | {key.writers} | {key.lifetime} | {key.meaning} |"
        for key in KEYS
    ]
    return "\n".join(lines) + "\n"


def errors_markdown() -> str:
    """Return the table of all errors with their wire names."""
    lines = ["| code | error | try again | meaning |", "|---|---|---|---|"]
    for kind in _error_classes(errors.MixfleetError):
        first_line = (kind.__doc__ or "").strip().partition("\n")[0]
        again = "yes" if kind.retryable else "no"
        lines.append(f"| `{kind.code}` | `{kind.__name__}` | {again} | {first_line} |")
    return "\n".join(lines) + "\n"


def _error_classes(kind: type[errors.MixfleetError]) -> Iterator[type[errors.MixfleetError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _error_classes(child)


TABLES: dict[str, Callable[[], str]] = {
    "errors": errors_markdown,
    "keys": keys_markdown,
    "metrics": metrics_markdown,
    "redis_options": options_markdown,
    "settings": settings_markdown,
}


def generated(text: str) -> str:
    """Return ``text`` with every generated part made anew."""
    return _PART.sub(lambda part: f"{part[1]}{TABLES[part[2]]()}{part[3]}", text)


def main() -> None:
    """Rewrite the pages that hold generated parts."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text()
        if generated(text) != text:
            page.write_text(generated(text))


if __name__ == "__main__":
    main()
