"""The table of faults is the suite of faults: no row without a test, no test without a row."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = [f"F{number}" for number in range(1, 19)]
ROW = re.compile(r"^\| (F\d+) \|.*\| `(test_\w+)` \|$", re.MULTILINE)


def rows() -> list[tuple[str, str]]:
    """Fault and test of each row."""
    return ROW.findall((ROOT / "docs" / "faults.md").read_text())


def named_in(files: list[Path]) -> set[str]:
    """The names of all tests in some files."""
    return {
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_line_of_the_table_is_a_row() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    assert len(rows()) == sum(line.startswith("| F") for line in text.splitlines())


def test_every_fault_has_a_row_and_the_rows_are_in_order() -> None:
    numbers = [fault for fault, _ in rows()]
    assert list(dict.fromkeys(numbers)) == FAULTS


def test_every_test_in_the_table_exists() -> None:
    known = named_in([*(ROOT / "tests").rglob("test_*.py")])
    assert [name for _, name in rows() if name not in known] == []


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "faults").glob("test_f*.py")), ids=str)
def test_every_test_of_a_fault_has_a_row_under_its_number(file: Path) -> None:
    number = int(file.name.removeprefix("test_f")[:2])
    listed = {name for fault, name in rows() if fault == f"F{number}"}
    assert named_in([file]) <= listed
