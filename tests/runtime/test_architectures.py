"""Every architecture through the whole conversion, projections too, and into a fresh process."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import skimp
import torch
from skimp.passes.budget import Budget
from skimp.passes.lift import blocks
from skimp.passes.project import Project
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify

pytest.importorskip("transformers")
TESTS = Path(__file__).parent.parent / "passes"
sys.path.insert(0, str(TESTS))
from test_project import ZOO, first_tensor  # noqa: E402

NAMES = ["bert", "gpt2", "llama", "gemma", "t5", "vit", "whisper", "phi3", "torch-fused"]
STEPS = [
    Project(tokens=30, chunk=30, batch=16),
    Relufy(),
    Sparsify(tokens=30, chunk=30, batch=16),
    Split(),
    Route(tokens=60, steps=5, batch=32),
    Recover(steps=2, share=0.6),
    Budget("flops <= 0.9"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every architecture, converted and written, with the outputs that each should give."""
    root = tmp_path_factory.mktemp("architectures")
    for name in NAMES:
        torch.manual_seed(0)
        model, inputs, count, _ = ZOO[name]()
        done = skimp.convert(
            model.eval(), [inputs] * 3, passes=STEPS, expert_size=4, router_width=4,
            projections=True,
        )  # fmt: skip
        found = blocks(done.model)
        assert sum(b.linear for b in found.values()) == count, name
        assert len(found) > count, name
        assert done.history[-1]["stats"]["tried"][-1]["flops"] <= 0.9, name
        skimp.save(done.model, root / name, inputs)
        with torch.no_grad():
            want = first_tensor(done.model(**inputs))
        torch.save({"inputs": inputs, "want": want}, root / f"{name}.pt")
    return root


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_tau_zero_is_every_expert(folders, name):
    model, inputs, *_ = ZOO[name]()
    loaded = skimp.load(folders / name, model.eval())
    assert any(0 < float(b.tau) < 1 for b in blocks(loaded).values())
    skimp.set_tau(loaded, 0.0)
    dense = copy.deepcopy(loaded)
    for b in blocks(dense).values():
        b.dense = True
    got, want = first_tensor(loaded(**inputs)), first_tensor(dense(**inputs))
    assert (got - want).norm() <= 1e-5 * want.norm()


FRESH = """
import sys, torch, skimp
sys.path.insert(0, sys.argv[1])
from test_project import ZOO, first_tensor
for path in sys.argv[2:]:
    case = torch.load(path + ".pt")
    torch.manual_seed(1)  # other weights than were converted
    model = skimp.load(path, ZOO[path.rsplit("/", 1)[1]]()[0])
    with torch.no_grad():
        got = first_tensor(model(**case["inputs"]))
    error = float((got - case["want"]).norm() / case["want"].norm())
    assert error <= 1e-6, (path, error)
    print(path)
"""

WITHOUT = """
import sys
sys.modules["skimp"] = None  # as if it were not installed
import transformers
for path in sys.argv[1:]:
    try:
        transformers.AutoModel.from_pretrained(path)
    except (OSError, ValueError) as error:
        assert "config" in str(error), error
    else:
        raise SystemExit(f"{path} was loaded as something else")
"""


def python(code, *args):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)], capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip


def test_a_fresh_process_gives_the_same_outputs(folders):
    done = python(FRESH, TESTS, *(folders / n for n in NAMES))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == len(NAMES)


def test_transformers_alone_refuses_what_skimp_saved(folders):
    done = python(WITHOUT, *(folders / n for n in NAMES))
    assert done.returncode == 0, done.stderr[-2000:]
