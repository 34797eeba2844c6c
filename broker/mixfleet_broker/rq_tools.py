"""``python -m mixfleet_broker.rq_tools TOOL [ARGUMENT...]``: a tool of rq in a hardened process.

`mixfleet rq` starts it, with the server's URL in the tool's own variable of the environment.
"""

import os
import sys
from collections.abc import Sequence

from rq.cli.cli import main as rq_main

from mixfleet_broker.errors import MixfleetError
from mixfleet_broker.rq_hardening import harden


def main(tool: str, *arguments: str) -> None:
    """Run one tool to its end; ``tool`` is dashboard, exporter or a command of rq's own."""
    try:
        harden()
    except MixfleetError as error:
        sys.exit(f"Error: {error}")
    if tool == "dashboard":
        from mixfleet_broker.rq_page import serve

        serve(arguments)
    elif tool == "exporter":
        _export(arguments)
    else:
        rq_main.main(args=[tool, *arguments], prog_name="mixfleet rq")


def _export(arguments: Sequence[str]) -> None:
    # On this machine alone unless told otherwise, as the dashboard; rq-exporter's own default is
    # every interface. It reads the variable when it is imported, and argv by itself.
    os.environ.setdefault("RQ_EXPORTER_HOST", "127.0.0.1")
    sys.argv = ["mixfleet rq exporter", *arguments]
    from rq_exporter.__main__ import main as export

    try:
        export()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
