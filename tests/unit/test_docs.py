"""The docs are true: generated tables are current, links lead somewhere, commands exist."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import click
import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("docs/adr/*.md")]
    if not path.parts[len(ROOT.parts)].startswith(".")
)


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=page_id)
def test_generated_parts_are_current(page: Path, generate: ModuleType) -> None:
    text = page.read_text()
    assert text == generate.generated(text), "run: python docs/generate.py"


@pytest.mark.parametrize("name", ["errors", "keys", "metrics", "redis_options", "settings"])
def test_every_generated_table_stands_on_a_page(name: str) -> None:
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    assert sum(f"<!-- generated: {name} -->" in text for text in pages) == 1


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_named_in_the_docs_exist(page: Path) -> None:
    from mixfleet.cli import main

    named = set(re.findall(r"`(?:\.venv/bin/)?mixfleet ([a-z]+)", page.read_text()))
    assert named <= set(main.list_commands(click.Context(main)))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=page_id
)
def test_python_examples_compile(page: Path) -> None:
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(example, str(page), "exec")


def test_the_changelog_opens_with_what_is_not_released_yet() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"


def test_the_figures_in_the_readme_are_those_of_the_benchmark() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "fleet.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for row in result["rows"]:
        assert f"{row['ratio']:.2f} times" in readme


@pytest.mark.parametrize(
    ("shown", "engine"),
    [
        ("mixfleet bf16", "mixfleet auto:bf16"),
        ("mixfleet int8", "mixfleet auto:int8"),
        ("mixfleet int4", "mixfleet auto:int4"),
        ("llama.cpp bf16", "llama_cpp bf16"),
        ("llama.cpp Q4_0", "llama_cpp q4_0"),
    ],
)
def test_the_engines_in_the_readme_are_those_of_the_benchmark(shown: str, engine: str) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "engine.json").read_text())
    figures = result["models"]["demo"]["engines"][engine]
    rates = [figures["decode"][batch]["tokens_per_s"] for batch in ("1", "8", "32")]
    cells = [f"{rate:.0f}" for rate in (figures["prefill_tokens_per_s"], *rates)]
    assert f"| {shown} | {' | '.join(cells)} |" in (ROOT / "README.md").read_text()


def test_the_readme_quotes_the_gateways_figures() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "gateway.json").read_text())
    added = result["512"]["added_chunk_ms"]["p95"]
    pushed, polled = (result["64"][way]["chunk_ms"]["p95"] for way in ("gateway", "poll"))
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"takes {added:.1f} ms longer (p95, 512 streams)" in readme
    assert f"it arrives after {pushed:.1f} ms" in readme
    assert f"has it after {polled:.0f} ms" in readme


def test_the_figures_of_the_broker_in_the_readme_are_those_of_the_benchmark() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "broker.json").read_text())
    rates = (result["rates"][who]["both_per_s"] for who in ("mixfleet", "rq", "celery"))
    cells = " | ".join(f"{max(both.values()):.0f}" for both in rates)
    readme = (ROOT / "README.md").read_text()
    assert f"| {cells} | |" in readme
    streams = result["chunks"]
    ours, polled = (
        streams[f"1000 streams at 10/s, {way}"]["latency_ms"]["p95"]
        for way in ("100 a connection", "polling")
    )
    assert f"| {ours:.1f} ms | | | {polled:.0f} ms |" in readme
    first, last = (
        result["depth"]["one tenant"][depth]["claim"]["server_p50_ms"]
        for depth in ("100", "100000")
    )
    assert f"{last / first:.2f} times as long with 100,000 jobs waiting" in readme


def test_the_figures_of_the_soak_in_the_readme_are_those_of_the_soak() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "chaos.json").read_text())
    soak, faults = result["result"], result["faults"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    for figure in (
        f"{soak['jobs_submitted']:,} jobs",
        f"{faults['killed']} killed workers",
        f"{faults['Redis killed']} killed Redis servers",
        f"{soak['lost']} lost, {soak['duplicated']} said twice, {soak['wrong_text']} wrong",
        f"{soak['recovery_p50_s']:.1f} s (p99 {soak['recovery_p99_s']:.1f} s)",
    ):
        assert figure in readme
