import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mixfleet_engine.ops.cuda.tuning_file import TunedFor, TuningFile, sources_digest

HERE = TunedFor(device="NVIDIA H100 80GB HBM3", capability="9.0", triton="3.6.0", kernels="a1b2")
CHOICE = {"block_n": 128, "num_warps": 4}


def test_choices_are_there_for_the_next_process(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet" / "there"
    TuningFile(folder, HERE).add({"gemm": CHOICE})
    assert TuningFile(folder, HERE).read() == {"gemm": CHOICE}


def test_what_others_have_written_meanwhile_is_kept(tmp_path: Path) -> None:
    first, second = TuningFile(tmp_path, HERE), TuningFile(tmp_path, HERE)
    first.read()
    second.add({"b": CHOICE})
    first.add({"a": CHOICE})
    assert second.read() == {"a": CHOICE, "b": CHOICE}


def test_several_that_write_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    def write(name: str) -> None:
        file = TuningFile(tmp_path, HERE)
        for number in range(25):
            file.add({f"{name} {number}": CHOICE})

    # A lock holds between openings of a file, be they of one process or of several.
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, "abcd"))
    assert len(TuningFile(tmp_path, HERE).read()) == 100


@pytest.mark.parametrize("field", list(asdict(HERE)))
def test_another_gpu_triton_or_kernel_has_another_file(field: str) -> None:
    other = replace(HERE, **{field: "other/../name"})
    assert other.file_name != HERE.file_name
    assert Path(other.file_name).name == other.file_name


def test_a_changed_source_changes_the_digest(tmp_path: Path) -> None:
    source = tmp_path / "norm.py"
    source.write_text("x = 1")
    before = sources_digest(tmp_path)
    assert sources_digest(tmp_path) == before
    source.write_text("x = 2")
    assert sources_digest(tmp_path) != before


BROKEN = {
    "empty": "",
    "half": '{"tuned_for": {"dev',
    "not text": b"\xff\xfe\x00",
    "a list": "[1]",
    "nothing in it": "{}",
    "of another GPU": json.dumps({"tuned_for": {**asdict(HERE), "device": "A100"}, "choices": {}}),
    "choices of another form": json.dumps({"tuned_for": asdict(HERE), "choices": [1]}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_cannot_be_used_is_a_warning_and_is_written_anew(
    content: str | bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = TuningFile(tmp_path, HERE)
    file.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert file.read() == {}
    assert str(file.path) in caplog.text
    file.add({"gemm": CHOICE})
    assert file.read() == {"gemm": CHOICE}


def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A file in place of the folder: not even root can write into it.
    (tmp_path / "taken").write_text("")
    file = TuningFile(tmp_path / "taken", HERE)
    with caplog.at_level(logging.WARNING):
        file.add({"a": CHOICE})
        file.add({"b": CHOICE})
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text


def test_writing_leaves_no_other_files_but_the_lock(tmp_path: Path) -> None:
    file = TuningFile(tmp_path, HERE)
    file.add({"a": CHOICE})
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".lock"}
