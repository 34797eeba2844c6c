import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mixfleet_broker.errors import MissingExtraError
from mixfleet_worker import cli
from mixfleet_worker.cli import check_installed, worker
from mixfleet_worker.loop import EngineBrokenError
from mixfleet_worker.up import up


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


def test_tensor_parallelism_is_refused_clearly() -> None:
    result = run("--simulated", "--tp", "2")
    assert result.exit_code == 1
    assert "tp=2" in result.output


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
    result = CliRunner().invoke(
        up, ["--data-dir", str(tmp_path), "--model-path", str(tmp_path / "nowhere")]
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
    result = CliRunner().invoke(up, ["--data-dir", str(tmp_path), *arguments], env=unset)
    assert result.exit_code == 1
    assert f"pip install 'mixfleet[{extras}]'" in result.output


@pytest.mark.parametrize("below", ["", "b"])
def test_up_names_a_data_directory_that_cannot_be_made(below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = CliRunner().invoke(up, ["--simulated", "--data-dir", str(file / below)])
    assert result.exit_code == 1
    assert f"Error: data_dir={file / below}: " in result.output
