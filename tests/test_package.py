"""What is shipped: exactly the package's modules, importable without extras in a fresh place."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("ir", "passes", "codegen", "runtime")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # without what an earlier build left, which setuptools would ship again
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "out", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(out.glob("skimp-*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    held = {n for n in names if ".dist-info/" not in n}
    kinds = (".py", ".h", ".cpp", ".html", ".json", ".jsonl")
    files = [p for r in ROOMS for p in (ROOT / r).rglob("*") if p.suffix in kinds]
    files += [
        p for n in ("__init__.py", "__main__.py", "cli*.py", "py.typed") for p in ROOT.glob(n)
    ]
    assert held == {f"skimp/{p.relative_to(ROOT)}" for p in files if "__pycache__" not in p.parts}


def test_the_wheel_installs_in_a_fresh_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    import torch

    # torch is large: the fresh environment borrows the one that runs the tests
    site = Path(torch.__file__).parent.parent
    code = f"import sys; sys.path.append({str(site)!r}); import skimp; print(skimp.__file__)"
    got = subprocess.run(
        [python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert str(tmp_path / "venv") in got.stdout


def test_import_takes_little():
    code = (
        "import time, torch; start = time.perf_counter(); import skimp, sys; "
        "print(time.perf_counter() - start); "
        "assert not {'transformers', 'diffusers', 'matplotlib', 'typer', 'safetensors', "
        "'gymnasium', 'stable_baselines3', 'sb3_contrib', 'sklearn'} "
        "& set(sys.modules)"
    )
    got = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(got.stdout) < 10  # a loaded machine; alone it is a fraction of a second
