"""The C++ example runs a package with no Python."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import skimp
import torch

pytest.importorskip("transformers")
import models
from archives import rewritten
from fresh import expected
from skimp.codegen.cpp.build import compiler
from skimp.ir.cost import cache_dir
from skimp.runtime.cached import cached_example

ROOT = Path(skimp.__file__).parent
SOURCE = ROOT / "examples" / "cpp" / "run.cpp"
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def program():
    """Compiled once per text and torch: it takes ten seconds."""
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {TORCH}".encode())
    path = cache_dir() / "examples" / f"run-{key.hexdigest()[:16]}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}-{os.getpid()}")
        include = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
        command = [*compiler(), "-std=c++20", str(SOURCE), "-o", str(draft), *include, *libraries]
        subprocess.run([*command, f"-Wl,-rpath,{TORCH / 'lib'}"], check=True)
        os.replace(draft, path)
    return path


def run(program, *args):
    # an empty environment: there is no Python, and nothing of it, on any path
    command = [str(program), *map(str, args)]
    return subprocess.run(command, env={}, capture_output=True, text=True, check=False)


def check_program(program, model, package, out, cases, causal=False):
    """Its first output in all cases of a threshold and a shape; those that are the model's."""
    outputs = []
    for tau, (batch, length) in cases:
        got = run(program, package, tau, batch, length, out)
        assert got.returncode == 0, got.stderr
        tokens = (torch.arange(batch * length) % 50 + 5).view(batch, length)
        kwargs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        want, rows = expected(model, tau, kwargs, causal)[0]
        assert got.stdout == f"{list(want.shape)}\n"
        y = torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.float32).view(want.shape)
        assert (y - want)[rows].norm() <= 1e-4 * want[rows].norm()
        outputs.append(y)
    return outputs


def test_it_gives_the_same_at_every_threshold(program, small, pt2, tmp_path):
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert "libpython" not in needed
    cases = [(0.0, (1, 1)), (0.3, (2, 7)), (0.9, (2, 7)), (0.3, (8, 16))]
    outputs = check_program(program, small, pt2[0], tmp_path / "out", cases)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-3)  # the knob does something


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_whole_models(program, name, tmp_path):
    model, causal = getattr(models, name)(), name == "smollm2"
    example, shapes = cached_example(model) if causal else (models.ids(), None)
    skimp.export(model, example, tmp_path / "m.pt2", dynamic_shapes=shapes)
    cases = [(0.3, shape) for shape in models.SHAPES]
    check_program(program, model, tmp_path / "m.pt2", tmp_path / "out", cases, causal)


def test_it_says_what_is_wrong(program, pt2, tmp_path):
    assert "usage: run" in run(program).stderr
    path = tmp_path / "m.pt2"
    path.write_bytes(pt2[0].read_bytes()[:5000])
    got = run(program, path, 0, 2, 2, tmp_path / "out")
    assert got.returncode == 1
    assert "zip archive" in got.stderr
    rewritten(pt2[0], path, lambda n, d: None if "skimp" in n else d)
    got = run(program, path, 0, 2, 2, tmp_path / "out")
    assert got.returncode == 1
    assert "skimp/kernels.so" in got.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_the_build_file(pt2, tmp_path):
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["-S", str(SOURCE.parent), "-B", "build", prefix], ["--build", "build"]):
        subprocess.run(["cmake", *command], cwd=tmp_path, check=True)
    got = run(tmp_path / "build" / "run", pt2[0], 0.3, 2, 3, tmp_path / "out")
    assert got.stdout == "[2, 3, 16]\n"
