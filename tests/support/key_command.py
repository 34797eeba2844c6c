"""API keys as operators make them, with the command."""

import json
import subprocess
import sys
from typing import Any


def mixfleet(url: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mixfleet", *arguments, "--redis", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def make_key(url: str, *options: str) -> dict[str, Any]:
    """Make a key; its id and its secret are in the answer."""
    made = mixfleet(url, "key", "create", "--name", "test", "--json", *options)
    assert made.returncode == 0, made.stderr
    record: dict[str, Any] = json.loads(made.stdout)
    return record
