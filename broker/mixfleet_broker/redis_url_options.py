"""What may follow the ``?`` of a Redis URL: one table, for the check and for the docs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, Literal

Where = Literal["any", "rediss", "sentinel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UrlOption:
    """One option of a URL's query."""

    where: Where
    """Which URLs may have it: all, those with TLS, those that name Sentinels."""
    read: Callable[[str], object]
    """From text to value; raises ValueError, whose text says what the value must be."""
    meaning: str
    secret: bool = False
    """Whether its value is hidden wherever the URL is shown."""


def _text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _whole(value: str) -> int:
    if not value.isdecimal():
        raise ValueError("must be a whole number")
    return int(value)


def _seconds(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError("must be a number of seconds above 0")
    return number


def _switch(value: str) -> bool:
    words = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    if value.lower() not in words:
        raise ValueError("must be yes or no")
    return words[value.lower()]


def _cert_reqs(value: str) -> str:
    if value not in ("required", "optional", "none"):
        raise ValueError("must be required, optional or none")
    return value


URL_OPTIONS: Final[Mapping[str, UrlOption]] = {
    "db": UrlOption(
        where="any", read=_whole, meaning="Number of the database, for `unix://`; default 0."
    ),
    "username": UrlOption(
        where="any", read=_text, meaning="User name, where it does not stand before the `@`."
    ),
    "password": UrlOption(
        where="any",
        read=_text,
        meaning="Password, where it does not stand before the `@`.",
        secret=True,
    ),
    "client_name": UrlOption(
        where="any",
        read=_text,
        meaning="Name of the connections in `CLIENT LIST`; takes `+client|setname`.",
    ),
    "socket_timeout": UrlOption(
        where="any",
        read=_seconds,
        meaning="Longest wait for a reply, in seconds; longer than a read may block, which is 5 s.",
    ),
    "socket_connect_timeout": UrlOption(
        where="any", read=_seconds, meaning="Longest wait for a connection, in seconds; default 2."
    ),
    "health_check_interval": UrlOption(
        where="any",
        read=_whole,
        meaning="A connection idle for so many seconds is pinged before use; default 15.",
    ),
    "max_connections": UrlOption(
        where="any", read=_whole, meaning="Most connections of one client; default 10000."
    ),
    "ssl_ca_certs": UrlOption(
        where="rediss",
        read=_text,
        meaning="File of the CA certificates to trust, PEM; default: the system's.",
    ),
    "ssl_ca_path": UrlOption(
        where="rediss", read=_text, meaning="Directory of CA certificates, as OpenSSL names them."
    ),
    "ssl_certfile": UrlOption(
        where="rediss", read=_text, meaning="File of the client's own certificate, PEM."
    ),
    "ssl_keyfile": UrlOption(
        where="rediss",
        read=_text,
        meaning="File of its key, where the certificate's file does not hold it.",
    ),
    "ssl_password": UrlOption(
        where="rediss", read=_text, meaning="Password of the key's file.", secret=True
    ),
    "ssl_check_hostname": UrlOption(
        where="rediss",
        read=_switch,
        meaning="Whether the certificate must name the host; default yes.",
    ),
    "ssl_cert_reqs": UrlOption(
        where="rediss",
        read=_cert_reqs,
        meaning="`none` takes any certificate, so that anybody in between can read along; "
        "default `required`.",
    ),
    "sentinel_username": UrlOption(
        where="sentinel", read=_text, meaning="User name at the Sentinels; default: none."
    ),
    "sentinel_password": UrlOption(
        where="sentinel",
        read=_text,
        meaning="Password at the Sentinels; default: none.",
        secret=True,
    ),
}
"""All options by name."""

SECRET_OPTIONS: Final = frozenset(name for name, option in URL_OPTIONS.items() if option.secret)


def read_options(
    pairs: Iterable[tuple[str, str]], *, tls: bool, sentinel: bool
) -> dict[str, object]:
    """Return the options of a URL by name, read.

    Raises:
        ValueError: One is unknown, out of place or cannot be used; the text names it and never
            holds a value.
    """
    allowed = {"any"} | ({"rediss"} if tls else set()) | ({"sentinel"} if sentinel else set())
    values: dict[str, object] = {}
    for name, value in pairs:
        option = URL_OPTIONS.get(name)
        if option is None:
            nearest = get_close_matches(name, list(URL_OPTIONS), n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"has an option that is none of ours: {name}{hint}")
        if option.where not in allowed:
            needed = "rediss://" if option.where == "rediss" else "redis+sentinel://"
            raise ValueError(f"may have {name} only with {needed}")
        try:
            values[name] = option.read(value)
        except ValueError as error:
            raise ValueError(f"has a {name} that {error}") from None
    if "ssl_keyfile" in values and "ssl_certfile" not in values:
        raise ValueError("may have ssl_keyfile only with ssl_certfile")
    return values


def options_markdown() -> str:
    """Return the table of docs/operations.md, which a test compares with this."""
    places = {"any": "all", "rediss": "`rediss://`", "sentinel": "`+sentinel`"}
    lines = ["| option | in | what it sets |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {places[option.where]} | {option.meaning.replace('|', chr(92) + '|')} |"
        for name, option in URL_OPTIONS.items()
    ]
    return "\n".join(lines) + "\n"
