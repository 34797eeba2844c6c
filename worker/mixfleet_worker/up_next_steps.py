"""What ``mixfleet up`` tells its user to type next."""

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from mixfleet_broker.settings import CONFIG_FLAG, SETTINGS


def next_steps(given: Mapping[str, str], url: str) -> str:
    """Return what to type next, with the flags that find this very fleet.

    Args:
        given: Flags of the command line, by the names of settings.
        url: Of its Redis.
    """
    program = "mixfleet" if shutil.which("mixfleet") else _beside_python("mixfleet")
    found_by = [n for n in ("redis", "data_dir", "key_prefix", CONFIG_FLAG) if n in given]
    chat = shlex.join([program, "chat", *(part for n in found_by for part in (flag(n), given[n]))])
    client = f'Client("{url}")' if found_by else "Client()"
    prefix = given.get("key_prefix")
    where = f", with {SETTINGS['key_prefix'].variable}={shlex.quote(prefix)}" if prefix else ""
    return (
        "In another terminal:\n\n"
        f"  {chat}\n"
        f'  {chat} -q "What is a mixture of experts?"\n\n'
        f"Or in Python{where}:\n\n"
        "  from mixfleet import Client\n"
        f'  for text in {client}.chat("Why is the sky blue?"):\n'
        '      print(text, end="", flush=True)\n'
    )


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def _beside_python(program: str) -> str:
    """Return the path of a program of this virtual environment, short if it can be."""
    path = Path(sys.executable).parent / program
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
