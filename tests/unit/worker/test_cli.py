import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mixfleet_broker.errors import MissingExtraError
from mixfleet_engine.config import Shard
from mixfleet_engine.rendezvous import Rendezvous
from mixfleet_worker import cli
from mixfleet_worker.cli import check_installed, worker
from mixfleet_worker.group import LOST_STATUS, GroupLostError
from mixfleet_worker.loop import EngineBrokenError
from mixfleet_worker.up import up
from support.tiny_model import tiny_config, write_hf_checkpoint


def run(*arguments: str) -> Result:
    return CliRunner().invoke(worker, arguments)


def test_help_names_the_flags_and_their_variables() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for part in ("--model-path", "--redis", "--tp", "--simulated", "MIXFLEET_MAX_BATCH_SIZE"):
        assert part in result.output


@pytest.mark.parametrize("module", ["mixfleet_worker.cli", "mixfleet_worker.up"])
def test_the_commands_import_neither_torch_nor_a_tokenizer(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([m for m in ('torch', 'sentencepiece', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_worker_without_a_model_ends_with_one_clear_line() -> None:
    result = run()
    assert result.exit_code == 1
    assert "--model-path" in result.output


def test_a_simulated_engine_of_several_processes_is_refused() -> None:
    result = run("--simulated", "--tp", "2")
    assert result.exit_code == 1
    assert "tp=2: a simulated engine is one process" in result.output


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_hf_checkpoint(tmp_path / "tiny", tiny_config(n_layers=1))


def test_several_processes_get_the_flags_of_the_command_and_their_status_is_its_own(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], int]] = []

    def run_ranks(command: list[str], world: int, **_: object) -> int:
        started.append((command, world))
        return 7

    monkeypatch.setattr(cli, "run_ranks", run_ranks)
    flags = ("--model-path", str(checkpoint), "--redis", "redis://127.0.0.1:1", "--threads", "3")
    assert run("--tp", "2", *flags).exit_code == 7
    ((command, world),) = started
    assert world == 2
    assert "--tp" not in command
    given = dict(zip(command[3::2], command[4::2], strict=True))
    worker_id = given.pop("--worker-id")
    assert worker_id, "all ranks are the same worker"
    assert given == dict(zip(flags[::2], flags[1::2], strict=True)) | {
        "--parent-pid": str(os.getpid())
    }


def test_a_number_of_processes_that_cannot_share_the_model_is_refused(checkpoint: Path) -> None:
    result = run("--tp", "3", "--model-path", str(checkpoint), "--redis", "redis://127.0.0.1:1")
    assert result.exit_code == 1
    assert "tp=3: 3 ranks cannot share n_heads=4 equally; sizes that work: 1, 2" in result.output


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    place = Rendezvous(shard=Shard(rank=rank, world=2), local_rank=rank, host="127.0.0.1", port=1)
    for name, value in place.as_environment().items():
        monkeypatch.setenv(name, value)


def test_another_number_than_torchruns_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 0)
    result = run("--tp", "4", "--model-path", str(checkpoint))
    assert result.exit_code == 1
    assert "tp=4: torchrun started 2 processes" in result.output


def test_a_rank_whose_neighbour_is_gone_ends_without_an_error_of_its_own(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object, **__: object) -> None:
        raise GroupLostError("another rank is gone: connection reset")

    as_rank(monkeypatch, 1)
    monkeypatch.setattr("mixfleet_worker.serve.serve_as_rank", lost)
    result = run("--model-path", str(checkpoint), "--redis", "redis://127.0.0.1:1")
    assert result.exit_code == LOST_STATUS
    assert "Error" not in result.output


def test_a_bad_setting_is_named() -> None:
    result = run("--simulated", "--max-batch-size", "0")
    assert result.exit_code == 2
    assert "max_batch_size=0" in result.output


def test_settings_that_exclude_each_other_are_named() -> None:
    result = run("--simulated", "--max-batch-size", "8", "--max-step-tokens", "4")
    assert result.exit_code == 1
    assert "max_step_tokens=4" in result.output


def test_without_a_redis_the_worker_says_how_to_get_one(tmp_path: Path) -> None:
    result = run("--simulated", "--data-dir", str(tmp_path))
    assert result.exit_code == 1
    assert "mixfleet up" in result.output


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "ENGINE_MODULES", ("no_such_module_here",))
    result = run("--model-path", str(tmp_path), "--model", "x")
    assert result.exit_code == 1
    assert "pip install 'mixfleet[worker]'" in result.output


def test_check_installed_looks_at_every_module() -> None:
    check_installed(("json", "click"), what="this", extra="x")
    with pytest.raises(MissingExtraError, match="mixfleet\\[x\\]"):
        check_installed(("json", "no_such_module_here"), what="this", extra="x")


def test_an_engine_that_stays_broken_ends_the_command_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise EngineBrokenError("the engine failed twice in a row: device lost")

    monkeypatch.setattr("mixfleet_worker.serve.serve", broken)
    result = run("--simulated", "--redis", "redis://127.0.0.1:1")
    assert result.exit_code == 1
    assert "device lost" in result.output


def test_the_help_of_up_shows_what_it_can_do() -> None:
    result = CliRunner().invoke(up, ["--help"])
    assert result.exit_code == 0
    for part in ("--workers", "--simulated", "--data-dir", "--model-path"):
        assert part in result.output


def test_up_refuses_what_no_worker_could_run(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    result = CliRunner().invoke(
        up, ["--no-gateway", "--data-dir", str(tmp_path), "--model-path", nowhere]
    )
    assert result.exit_code == 1
    assert "no such directory" in result.output


@pytest.mark.parametrize(
    ("arguments", "extras"),
    [
        ((), "worker,embedded,demo"),
        (("--redis", "redis://127.0.0.1:1"), "worker,demo"),
        (("--model-path", "."), "worker,embedded"),
    ],
)
def test_up_names_all_missing_extras_at_once(
    arguments: tuple[str, ...], extras: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mixfleet_worker.up.ENGINE_MODULES", ("no_such_module_here",))
    unset = {"REDIS_URL": "", "MIXFLEET_REDIS": "", "MIXFLEET_MODEL_PATH": ""}
    options = ["--no-gateway", "--data-dir", str(tmp_path), *arguments]
    result = CliRunner().invoke(up, options, env=unset)
    assert result.exit_code == 1
    assert f"pip install 'mixfleet[{extras}]'" in result.output


@pytest.mark.parametrize("below", ["", "b"])
def test_up_names_a_data_directory_that_cannot_be_made(below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = CliRunner().invoke(up, ["--simulated", "--data-dir", str(file / below)])
    assert result.exit_code == 1
    assert f"Error: data_dir={file / below}: " in result.output
