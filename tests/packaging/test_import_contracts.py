"""Every import contract of pyproject.toml holds, and is seen to fail when it is broken."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "mixfleet": "client",
    "mixfleet_broker": "broker",
    "mixfleet_engine": "engine",
    "mixfleet_worker": "worker",
}

# contract id -> (a module that it guards, an import that it forbids there)
BREAKS = {
    "diamond": ("mixfleet.stream", "import mixfleet_engine.request"),
    "broker": ("mixfleet_broker.keys", "import mixfleet_engine.request"),
    "engine": ("mixfleet_engine.request", "import redis"),
    "worker": ("mixfleet_worker.loop", "import mixfleet"),
    "torch-free-broker": ("mixfleet.stream", "import torch"),
    "worker-direct": ("mixfleet_worker.loop", "import redis"),
    "bookkeeping": ("mixfleet_engine.scheduler", "import torch"),
    "one-room-redis": ("mixfleet_broker.messages", "import redis"),
    "one-room-rq": ("mixfleet_broker.messages", "import rq"),
    "one-room-msgpack": ("mixfleet_broker.keys", "import msgpack"),
    "one-room-sentencepiece": ("mixfleet_engine.scheduler", "import sentencepiece"),
    "one-room-safetensors": ("mixfleet_engine.model", "import safetensors"),
    "one-room-llguidance": ("mixfleet_worker.output_grammar", "import llguidance"),
    "one-room-triton": ("mixfleet_engine.model", "import triton"),
}


def contract_ids() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return [contract["id"] for contract in settings["tool"]["importlinter"]["contracts"]]


def lint_imports(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(folder / top) for top in PACKAGES.values()]
    return subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def copied_tree(tmp_path: Path) -> Path:
    for package, top in PACKAGES.items():
        shutil.copytree(ROOT / top / package, tmp_path / top / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_all_contracts_hold() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


def test_every_contract_has_a_break_to_try() -> None:
    assert sorted(BREAKS) == sorted(contract_ids())


@pytest.mark.slow
@pytest.mark.parametrize("contract", sorted(BREAKS))
def test_a_contract_fails_when_it_is_broken(contract: str, copied_tree: Path) -> None:
    module, statement = BREAKS[contract]
    package, name = module.split(".", 1)
    path = copied_tree / PACKAGES[package] / package / (name.replace(".", "/") + ".py")
    path.write_text(path.read_text() + f"\n{statement}\n")

    result = lint_imports(copied_tree, "--contract", contract)

    assert result.returncode == 1, result.stdout
    assert "BROKEN" in result.stdout
    assert module in result.stdout
