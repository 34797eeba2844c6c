"""The README's first screen, done for real: the fleet, the demo model, and the lines of Python."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MIXFLEET = Path(sys.executable).with_name("mixfleet")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a newcomer on whose machine ``mixfleet up`` has just become ready."""
    data_dir = tmp_path_factory.mktemp("data")
    variables = {
        **os.environ,
        "MIXFLEET_DATA_DIR": str(data_dir),
        "MIXFLEET_CONFIG": str(data_dir / "no.toml"),
        "MIXFLEET_LISTEN": "127.0.0.1:0",
    }
    (data_dir / "no.toml").touch()
    variables.pop("REDIS_URL", None)
    up = subprocess.Popen([MIXFLEET, "up"], env=variables, stdout=subprocess.PIPE, text=True)
    assert up.stdout is not None
    try:
        for line in up.stdout:
            if "mixfleet chat" in line:
                break
        else:
            pytest.fail("mixfleet up ended before it was ready")
        yield variables
    finally:
        up.send_signal(signal.SIGINT)
        up.communicate(timeout=60)
    assert up.returncode == 0


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_python_example_prints_what_the_readme_shows(environment: dict[str, str]) -> None:
    example = [sys.executable, "-c", block("python")]
    done = subprocess.run(
        example, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == ""
    assert done.stdout == block("text")


def test_the_example_is_about_ten_lines() -> None:
    assert len(block("python").strip().splitlines()) <= 11
