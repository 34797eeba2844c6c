"""The rest of the hardening's tests need a server: tests/redis/test_rq_planted.py."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_an_rq_that_it_does_not_fit_starts_no_tool() -> None:
    script = (
        "import rq.job; del rq.job.Job.get_meta\n"
        "from mixfleet_broker.rq_tools import main; main('info', '--url', 'unix:///nowhere')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: mixfleet cannot make rq ")
    assert "'get_meta'" in line
    assert "pip install" in line
