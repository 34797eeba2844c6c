import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mixfleet_engine import devices
from mixfleet_engine.devices import TorchFacts
from mixfleet_worker import doctor as doctor_module
from mixfleet_worker.doctor import doctor
from mixfleet_worker.fit_report import Here
from support.memory_machines import machine
from support.redis_server import RedisServer
from support.tiny_model import tiny_config, write_hf_checkpoint, write_mistral_checkpoint

NOBODY = "redis://127.0.0.1:1"


class CliRun:
    """Calls the command with a data directory of its own."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir

    def __call__(self, *arguments: str | Path) -> Result:
        words = [*map(str, arguments), "--data-dir", str(self.data_dir)]
        return CliRunner().invoke(doctor, words)


@pytest.fixture
def run(tmp_path: Path) -> CliRun:
    return CliRun(tmp_path / "data")


@pytest.fixture
def here_are_80_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Here(machine=machine(80), dtype="bfloat16")
    monkeypatch.setattr(doctor_module, "_here", lambda: here)


def checks_of(result: Result) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["state"], check["text"]) for check in json.loads(result.stdout)}


@pytest.mark.usefixtures("here_are_80_gib")
@pytest.mark.parametrize(
    ("name", "first"),
    [("8x7b", "mixtral-8x7b: 46.70 B"), ("Mixtral-8x22B", "mixtral-8x22b: 140.63 B")],
)
def test_a_published_model_needs_no_file(run: CliRun, name: str, first: str) -> None:
    result = run("--fit", name)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(first)
    assert "\nhere: the model does not fit 1x GPU, " in result.stdout


@pytest.mark.usefixtures("here_are_80_gib")
@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_a_folder_needs_only_its_config(run: CliRun, tmp_path: Path, layout: str) -> None:
    write = write_hf_checkpoint if layout == "hf" else write_mistral_checkpoint
    folder = write(tmp_path / "tiny")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    found = json.loads(run("--fit", folder, "--json").stdout)
    assert (found["model"], found["context_length"]) == ("tiny", 512)
    assert found["here"]["fits"] is True


@pytest.mark.usefixtures("here_are_80_gib")
def test_a_model_of_the_data_directory_goes_by_its_name(run: CliRun) -> None:
    write_hf_checkpoint(run.data_dir / "models" / "mine", tiny_config(n_layers=3))
    write_hf_checkpoint(run.data_dir / "models" / "smollm2-135m-moe", tiny_config(n_layers=4))
    assert "3 layers" in run("--fit", "mine").stdout
    assert "4 layers" in run("--fit", "demo").stdout


@pytest.mark.usefixtures("here_are_80_gib")
def test_dtype_and_context_reach_the_report(run: CliRun) -> None:
    found = json.loads(
        run("--fit", "8x7b", "--weight-dtype", "int8", "--context", "1000", "--json").stdout
    )
    assert {row["weight_dtype"] for row in found["table"]} == {"int8"}
    assert found["here"]["context"] == 1000
    assert found["here"]["weight_dtype"] == "int8"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--fit", "8x70b"), "8x70b: no directory, no model of "),
        (("--fit", "8x7b", "--context", "99999"), "context=99999: the model has 32768"),
    ],
)
@pytest.mark.usefixtures("here_are_80_gib")
def test_an_error_is_one_line(run: CliRun, arguments: tuple[str, ...], line: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {line}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_folder_without_a_model_is_one_line(run: CliRun, tmp_path: Path) -> None:
    result = run("--fit", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tmp_path}: neither params.json nor config.json in it\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--weight-dtype", "int8"),
        ("--context", "8192"),
        ("--fit", "8x7b", "--context", "0"),
        ("--fit", "8x7b", "--weight-dtype", "int2"),
    ],
)
def test_options_that_mean_nothing_are_usage_errors(
    run: CliRun, arguments: tuple[str, ...]
) -> None:
    assert run(*arguments).exit_code == 2


def test_this_machine_is_looked_at(run: CliRun) -> None:
    found = json.loads(run("--fit", "8x7b", "--json").stdout)["here"]
    assert found["device_bytes"] > 0
    assert found["fits"] is (found["problem"] is None)


def test_without_torch_the_named_machines_are_still_there(
    run: CliRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "find_spec", {}.get)
    result = run("--fit", "8x7b")
    assert result.exit_code == 0
    assert "1x A100 80GB" in result.stdout
    assert result.stdout.endswith("torch is not installed, so only the named machines\n")
    assert checks_of(run("--json"))["torch"][0] == "note"


def test_the_command_itself_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from mixfleet_worker import doctor\n"
        "doctor.find_spec = lambda name: None\n"
        "doctor.doctor(['--fit', '8x7b'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_checks_name_what_is_here(run: CliRun) -> None:
    import torch

    result = run("--json")
    found = checks_of(result)
    assert result.exit_code == 0
    assert list(found)[:3] == ["mixfleet", "python", "torch"]
    assert found["python"] == ("ok", ".".join(map(str, sys.version_info[:3])))
    assert found["torch"][1].startswith(torch.__version__)
    assert f"{torch.get_num_threads()} threads" in found["torch"][1]
    assert " GiB available" in found["device"][1]
    assert found["redis"] == ("note", "none is set and none runs: `mixfleet up` starts one")


@pytest.mark.parametrize(
    ("fast", "state", "dtype"), [(True, "ok", "bfloat16"), (False, "note", "float32")]
)
def test_a_cpu_that_does_not_multiply_bf16_is_noted_and_plans_in_fp32(
    run: CliRun, monkeypatch: pytest.MonkeyPatch, fast: bool, state: str, dtype: str
) -> None:
    facts = TorchFacts(version="2", threads=1, num_cores=2, cuda=None, bfloat16=fast)
    monkeypatch.setattr(devices, "torch_facts", lambda: facts)
    monkeypatch.setattr(devices, "found_machine", lambda: machine(64, kind="cpu"))
    assert checks_of(run("--json"))["bfloat16"][0] == state
    folder = write_hf_checkpoint(run.data_dir / "tiny")
    here = json.loads(run("--fit", folder, "--json").stdout)["here"]
    assert (here["weight_dtype"], here["kv_dtype"]) == (dtype, dtype)


def test_checks_are_a_line_each_for_people(run: CliRun) -> None:
    result = run()
    names = [line.split()[1] for line in result.stdout.splitlines() if line[0] != " "]
    assert names == list(checks_of(run("--json")))


def test_brackets_of_a_text_are_shown(run: CliRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "which", {"cc": "/opt/[worker]/cc"}.get)
    assert "/opt/[worker]/cc" in run().stdout


@pytest.mark.parametrize(
    ("installed", "state", "text"),
    [({"gcc": "/bin/gcc"}, "ok", "/bin/gcc"), ({}, "note", "none of cc, gcc, clang")],
)
def test_a_compiler_is_found_or_missed(
    run: CliRun,
    monkeypatch: pytest.MonkeyPatch,
    installed: dict[str, str],
    state: str,
    text: str,
) -> None:
    monkeypatch.setattr(doctor_module, "which", installed.get)
    found = checks_of(run("--json"))["compiler"]
    assert found[0] == state
    assert found[1].startswith(text)


def test_a_redis_that_is_set_and_does_not_answer_is_a_problem(
    run: CliRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "REDIS_PATIENCE_S", 0.05)
    result = run("--json", "--redis", NOBODY)
    state, text = checks_of(result)["redis"]
    assert (state, result.exit_code) == ("problem", 1)
    assert NOBODY in text


@pytest.mark.slow
def test_a_redis_that_answers_is_named_without_its_password(run: CliRun) -> None:
    with RedisServer() as server:
        state, text = checks_of(run("--json", "--redis", server.url))["redis"]
    assert state == "ok"
    assert text.startswith("answers at unix://")


@pytest.mark.slow
def test_what_is_found_of_a_redis_is_a_line_each_and_what_a_worker_refuses_is_a_problem(
    run: CliRun,
) -> None:
    with RedisServer("--appendonly", "no") as server:
        fair = run("--json", "--redis", server.url)
    assert fair.exit_code == 0
    states = {name: state for name, (state, _) in checks_of(fair).items()}
    assert states["redis-version"] == states["redis-memory"] == "ok"
    assert states["redis-persistence"] == "note"
    with RedisServer("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru") as server:
        bad = run("--json", "--redis", server.url)
    assert bad.exit_code == 1
    state, text = checks_of(bad)["redis-memory"]
    assert state == "problem"
    assert "Set maxmemory-policy noeviction" in text
