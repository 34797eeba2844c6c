import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mixfleet_engine.config import ModelConfig
from mixfleet_worker.model_cli import find_models, model
from support.gguf_files import gguf_tensors, write_gguf
from support.tiny_model import hf_tensors, tiny_config

CONFIG = tiny_config(shared_experts=True, tie_word_embeddings=True)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    tensors = gguf_tensors(CONFIG, hf_tensors(CONFIG), "dense")
    return write_gguf(tmp_path / "My Model (Q8).gguf", CONFIG, tensors)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(model, [str(argument) for argument in arguments])


def test_import_puts_the_model_under_its_name_in_the_data_directory(
    gguf_file: Path, tmp_path: Path
) -> None:
    result = run("import", gguf_file, "--data-dir", tmp_path / "data")
    target = tmp_path / "data" / "models" / "my-model-q8"
    assert result.exit_code == 0, result.output
    assert result.stdout == f"imported to {target}\n"
    assert ModelConfig.from_checkpoint(target).num_experts == 8


def test_import_takes_a_directory_and_a_number_of_experts(gguf_file: Path, tmp_path: Path) -> None:
    result = run("import", gguf_file, "--to", tmp_path / "made", "--num-experts", "4")
    assert result.exit_code == 0, result.output
    assert ModelConfig.from_checkpoint(tmp_path / "made").num_experts == 4


def test_an_import_that_fails_says_why_in_one_line(gguf_file: Path, tmp_path: Path) -> None:
    gguf_file.write_bytes(b"no model, but long enough to have a header")
    result = run("import", gguf_file, "--to", tmp_path / "made")
    assert result.exit_code == 1
    assert "Error: " in result.stderr
    assert "not a readable GGUF file" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "made").exists()


def test_one_expert_is_a_usage_error(gguf_file: Path) -> None:
    assert run("import", gguf_file, "--num-experts", "1").exit_code == 2


def test_pull_of_a_model_that_is_there_prints_its_directory(tmp_path: Path) -> None:
    target = tmp_path / "models" / "smollm2-135m-moe"
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    for name in ("demo", "smollm2-135m-moe"):
        result = run("pull", name, "--data-dir", tmp_path)
        assert (result.exit_code, result.output) == (0, f"{target}\n")


def test_a_pull_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "models" / "smollm2-135m-moe").mkdir(parents=True)
    result = run("pull", "demo", "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert "has no config.json; remove it and try again" in result.stderr
    assert "Traceback" not in result.output


def test_an_import_never_overwrites(gguf_file: Path, tmp_path: Path) -> None:
    assert run("import", gguf_file, "--to", tmp_path / "made").exit_code == 0
    again = run("import", gguf_file, "--to", tmp_path / "made")
    assert again.exit_code == 1
    assert again.stderr == f"Error: {tmp_path / 'made'}: is there already\n"


@pytest.mark.parametrize(
    ("file_name", "expected"),
    [("Mixtral-8x7B.Q4_K_M.gguf", "mixtral-8x7b.q4_k_m"), ("..gguf", "model"), ("é.gguf", "model")],
)
def test_a_model_is_named_as_its_queue_may_be(
    file_name: str, expected: str, gguf_file: Path, tmp_path: Path
) -> None:
    renamed = gguf_file.rename(tmp_path / file_name)
    assert run("import", renamed, "--data-dir", tmp_path).exit_code == 0
    assert [record.name for record in find_models(tmp_path)] == [expected]


def test_progress_is_a_bar_on_a_terminal(gguf_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "made"
    result = CliRunner().invoke(
        model, ["import", str(gguf_file), "--to", str(target)], env={"FORCE_COLOR": "1"}
    )
    assert result.stdout == f"imported to {target}\n"
    assert "importing My Model" in result.stderr


def test_pull_knows_only_the_demo_model(tmp_path: Path) -> None:
    result = run("pull", "mixtral-8x7b", "--data-dir", tmp_path)
    assert result.exit_code == 2
    assert "'demo'" in result.output


def test_ls_says_how_to_get_a_model_when_there_is_none(tmp_path: Path) -> None:
    result = run("ls", "--data-dir", tmp_path)
    assert result.exit_code == 0
    assert "`mixfleet model pull demo` gets one" in result.output
    assert json.loads(run("ls", "--json", "--data-dir", tmp_path).output) == []


def test_ls_lists_sizes_and_problems(gguf_file: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    run("import", gguf_file, "--to", models / "tiny")
    (models / "broken").mkdir()
    (models / ".tiny.partial").mkdir()
    result = run("ls", "--data-dir", tmp_path)
    assert result.exit_code == 0
    _, heading, broken, tiny = result.stdout.splitlines()
    assert heading.split() == ["NAME", "GIB", "LAYERS", "EXPERTS", "CONTEXT"]
    assert broken.split()[:5] == ["broken", "0.00", "-", "-", "-"]
    assert result.stderr.startswith("broken: ")
    assert tiny.split() == ["tiny", "0.00", "2", "8", "512"]


def test_ls_json_has_every_field(gguf_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "tiny"
    run("import", gguf_file, "--to", target)
    [record] = json.loads(run("ls", "--json", "--data-dir", tmp_path).output)
    assert record == {
        "name": "tiny",
        "path": str(target),
        "size_bytes": sum(file.stat().st_size for file in target.iterdir()),
        "num_layers": 2,
        "num_experts": 8,
        "context_length": 512,
        "problem": None,
    }


def test_a_model_that_cannot_be_used_is_listed_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / "models" / "broken").mkdir(parents=True)
    [record] = find_models(tmp_path)
    assert record.problem is not None
    assert "neither params.json nor config.json" in record.problem
