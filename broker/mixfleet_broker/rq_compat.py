"""What rq's tools find in the ``data`` field of a job of ours: a call that refuses to run.

rq shows and unpickles ``data`` in many places. A constant there keeps its tools working, and it
tells them neither the prompt nor anything that they could run.
"""

from typing import Final, NoReturn

REFUSING_CALL: Final = b"\x80\x02(X \x00\x00\x00mixfleet_broker.rq_compat.refuseN)}t."
"""``("mixfleet_broker.rq_compat.refuse", None, (), {})``, pickled; a test says so."""

DESCRIPTION: Final = "chat"
"""What rq's tools show of a job of ours."""

STOCK_FUNCTION: Final = "mixfleet.chat"
"""The function name under which rq producers enqueue a chat; it is never imported."""


def refuse() -> NoReturn:
    """Refuse to run a chat job in rq's own worker.

    Raises:
        RuntimeError: Always. The text says which worker to use.
    """
    raise RuntimeError(
        "this queue belongs to mixfleet: its jobs are run by `mixfleet worker`, not by `rq worker`"
    )
