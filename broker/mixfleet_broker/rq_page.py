"""rq-dashboard behind a door: who may open its page, and what it may be made to do there.

Its templates put what they are given into the page unescaped, and its buttons obey any site that
the operator's browser has open. Here it answers on this machine alone unless it has a password.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import urlsplit

import click
from flask import Response, request
from rq_dashboard import cli, web

from mixfleet_broker.redis_url import safe_redis_url

LOOPBACK: Final = "127.0.0.1"

_PASSWORD: Final = "set RQ_DASHBOARD_USERNAME and RQ_DASHBOARD_PASSWORD"
_ESCAPED_BY_THE_PAGE: Final[Mapping[str | None, frozenset[str]]] = {
    "rq_dashboard.list_jobs": frozenset({"description", "exc_info"}),
    "rq_dashboard.list_workers": frozenset({"description"}),
}
"""By endpoint: the few fields that a template of its own escapes."""


def serve(arguments: Sequence[str]) -> None:
    """Run rq-dashboard's own command with its own options, and end the process with it."""
    run = cli.run.callback
    assert run is not None
    cli.run.callback = _guarded(run)
    cli.run.main(
        args=list(arguments),
        prog_name="mixfleet rq dashboard",
        auto_envvar_prefix="RQ_DASHBOARD",
        default_map={"bind": LOOPBACK},
    )


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of rq-dashboard that let strangers in.

    Raises:
        click.UsageError: The text names the option and what to do.
    """
    has_name, has_password = bool(options["username"]), bool(options["password"])
    if options["debug"]:
        raise click.UsageError("--debug: its debugger runs the code that a visitor sends")
    if has_name != has_password:
        raise click.UsageError(f"a user name and a password go together: {_PASSWORD}")
    if not has_name and not is_loopback(options["bind"]):
        raise click.UsageError(
            f"--bind {options['bind']}: others can reach it there, and anybody who does can delete "
            f"jobs: {_PASSWORD}"
        )


def is_loopback(host: str | None) -> bool:
    """Whether ``host`` is this machine alone, by its own word or number."""
    if host == "localhost":
        return True
    try:
        return ip_address(host or "").is_loopback
    except ValueError:  # a name: whoever answers for it may send it anywhere
        return False


def _guarded(run: Callable[..., object]) -> Callable[..., object]:
    def guarded(**options: Any) -> object:
        check_options(options)
        web.escape_format_instance_list = lambda urls: [safe_redis_url(url) for url in urls]
        if not options["username"]:
            web.blueprint.before_request(_refuse_another_name)
        web.blueprint.before_request(_refuse_another_site)
        web.blueprint.after_request(_escape)
        return run(**options)

    return guarded


def _refuse_another_name() -> Response | None:
    # A stranger's name may lead to this machine (DNS rebinding): its page then counts as ours.
    if is_loopback(urlsplit(f"//{request.host}").hostname):
        return None
    return Response(f"not on this machine: {_PASSWORD}\n", 403, mimetype="text/plain")


def _refuse_another_site() -> Response | None:
    site = request.headers.get("Sec-Fetch-Site", "none")  # all browsers say it, and no script can
    changes = request.method != "GET" or request.endpoint == "rq_dashboard.requeue_all"
    if not changes or site in ("none", "same-origin"):
        return None
    return Response("another site must not press the buttons here\n", 403, mimetype="text/plain")


def _escape(response: Response) -> Response:
    if response.is_json:
        raw = _ESCAPED_BY_THE_PAGE.get(request.endpoint, frozenset())
        response.set_data(json.dumps(escaped(response.get_json(), raw)))
    return response


def escaped(value: object, raw: frozenset[str] = frozenset()) -> object:
    """Return JSON ``value`` with its texts escaped for HTML, but for those of the keys ``raw``."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, list):
        return [escaped(item, raw) for item in value]
    if isinstance(value, dict):
        return {
            escape(key): item if key in raw and isinstance(item, str) else escaped(item, raw)
            for key, item in value.items()
        }
    return value
