"""The wheel holds everything, and its base install runs without torch."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "client": "mixfleet",
    "broker": "mixfleet_broker",
    "engine": "mixfleet_engine",
    "worker": "mixfleet_worker",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, ROOT],
        check=True,
        capture_output=True,
        timeout=100,
    )
    [path] = target.glob("*.whl")
    return path


def source_files() -> set[str]:
    files = set()
    for top, package in PACKAGES.items():
        for path in (ROOT / top / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                files.add(path.relative_to(ROOT / top).as_posix())
    return files


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == source_files()


@pytest.mark.slow
def test_the_base_install_needs_no_torch(wheel: Path, tmp_path: Path) -> None:
    """A venv that sees only what the base install asks for, taken from this one's packages."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    base = tmp_path / "base"
    base.mkdir()
    packages = Path(next(p for p in sys.path if p.endswith("site-packages")))
    allowed = ("click", "msgpack", "platformdirs", "prompt_toolkit", "wcwidth", "redis")
    more = ("requests", "urllib3", "idna", "certifi", "charset_normalizer", "rich", "rq")
    also = ("markdown_it", "mdurl", "pygments", "croniter", "dateutil", "six.py", "hiredis")
    for name in (*allowed, *more, *also):
        if (packages / name).exists():
            (base / name).symlink_to(packages / name)

    script = "import sys, mixfleet, mixfleet.cli; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": f"{wheel}{os.pathsep}{base}"}
    subprocess.run([python, "-c", script], check=True, env=environment, timeout=60)

    worker = subprocess.run(
        [python, "-m", "mixfleet", "worker", "--model-path", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert worker.returncode != 0
    assert "pip install 'mixfleet[worker]'" in worker.stderr
