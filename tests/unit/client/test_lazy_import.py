"""What a start costs: seconds of a user's life, and a torch that may not even be installed."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "sentencepiece", "tokenizers", "safetensors", "numpy"}


def imported_by(*arguments: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter imports while it runs."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 10
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", "import mixfleet"),
        ("-c", "from mixfleet import Client, ChatStream, MixfleetError"),
        ("-m", "mixfleet", "--help"),
        ("-m", "mixfleet", "chat", "--help"),
    ],
    ids=["package", "names", "help", "chat"],
)
def test_the_client_imports_neither_torch_nor_the_worker(arguments: tuple[str, ...]) -> None:
    assert not imported_by(*arguments) & (HEAVY | {"mixfleet_engine", "mixfleet_worker"})


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("-c", "import mixfleet"), ("-m", "mixfleet", "--help")])
def test_the_help_does_not_wait_for_redis(arguments: tuple[str, ...]) -> None:
    assert not imported_by(*arguments) & {"redis", "rq", "prompt_toolkit"}
