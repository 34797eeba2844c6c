"""Which replies of a server pass by themselves, by redis-py's class or by the text."""

import pytest
from redis.exceptions import MasterDownError, ReadOnlyError, ResponseError

from mixfleet_broker.redis_errors import is_passing

IN_A_SCRIPT = "Error running script (call to f_0): @user_script:3: @user_script: 3: "
"""How a server before version 7 wraps the reply to a command of a script."""


@pytest.mark.parametrize(
    "error",
    [
        ReadOnlyError("You can't write against a read only replica."),
        MasterDownError("Link with MASTER is down"),
        ResponseError("NOREPLICAS Not enough good replicas to write."),
        ResponseError("UNBLOCKED force unblock from blocking operation"),
        ResponseError("BUSY Redis is busy running a script."),
        ResponseError(f"{IN_A_SCRIPT}-READONLY You can't write against a read only replica."),
        ResponseError(f"{IN_A_SCRIPT}-NOREPLICAS Not enough good replicas to write."),
        ResponseError(f"{IN_A_SCRIPT}-MASTERDOWN Link with MASTER is down"),
    ],
)
def test_a_server_that_cannot_serve_now_is_known_by_its_reply(error: ResponseError) -> None:
    assert is_passing(error)


@pytest.mark.parametrize(
    "text",
    [
        "WRONGTYPE Operation against a key holding the wrong kind of value",
        "BUSYGROUP Consumer Group name already exists",
        "unknown command 'READONLYNESS'",
        "OOM command not allowed when used memory > 'maxmemory'.",
        "",
    ],
)
def test_other_errors_are_final(text: str) -> None:
    assert not is_passing(ResponseError(text))
