"""``mixfleet chat --local DIR``: the engine's own console, which needs no fleet.

The client never imports the engine: it becomes the engine's process instead.
"""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from mixfleet_broker.errors import MissingExtraError

_FLAGS = {
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "max_tokens": "--max-tokens",
    "seed": "--seed",
}


def local_command(
    checkpoint: Path,
    *,
    question: str | None,
    system: str | None,
    sampling: Mapping[str, Any],
    shows_stats: bool,
) -> list[str]:
    """Return the command of the engine's console.

    Args:
        checkpoint: Directory of the model.
        question: To be answered once; None: a conversation.
        system: Instruction in front, if any.
        sampling: What was given, by the name of its option.
        shows_stats: Whether each answer is followed by what it took.

    Raises:
        click.UsageError: An option that only a fleet has was given.
        MissingExtraError: The engine is not installed.
    """
    if find_spec("torch") is None or find_spec("mixfleet_engine") is None:
        raise MissingExtraError(what="a local chat", extra="worker")
    command = [sys.executable, "-m", "mixfleet_engine.chat", "--ckpt-dir", str(checkpoint)]
    for name, value in sampling.items():
        if name not in _FLAGS:
            raise click.UsageError(f"--{name.replace('_', '-')} works with a fleet only")
        command.append(f"{_FLAGS[name]}={value}")
    if system is not None:
        command.append(f"--system={system}")
    if question is not None:
        command.append(f"--question={question}")
    if shows_stats:
        command.append("--stats")
    return command
