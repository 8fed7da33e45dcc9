"""Artefacts in a fresh process, on many inputs, against the model."""

import subprocess
import sys

import numpy as np
import skimp
import torch
from skimp.codegen.exported import run_model, tensors_of, watch_ties

CASES = """
import json, sys
import numpy as np
path, cases = sys.argv[1], np.load(sys.argv[2])

def check(run):
    for i in range(int(cases["count"])):
        inputs = {n.partition("<")[2]: cases[n] for n in cases.files if n.startswith(f"{i}<")}
        outputs = run(cases[f"{i}="], inputs)
        assert len(outputs) == sum(n.startswith(f"{i}>") for n in cases.files)
        for j, got in enumerate(outputs):
            want = cases[f"{i}>{j}"]
            rows = cases[f"{i}?{j}"]
            error = np.linalg.norm((got - want)[rows])
            assert got.shape == want.shape
            assert error <= 1e-4 * np.linalg.norm(want[rows]), (i, j, want.shape, error)
"""
DOORS = {
    "pt2": """
import torch
from skimp.codegen.package import load_pt2
package = load_pt2(path)
assert "transformers" not in sys.modules
def run(tau, inputs):
    package.set_tau(float(tau))
    return [y.numpy() for y in package.run({n: torch.from_numpy(x) for n, x in inputs.items()})]
check(run)
""",
    "onnx": """
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.enable_profiling = True
options.profile_file_prefix = path + ".profile"
for library in sys.argv[3:]:
    options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
names = [i.name for i in session.get_overridable_initializers()]
taus = json.loads(session.get_modelmeta().custom_metadata_map["skimp.taus"])
assert names == list(taus.values())
check(lambda tau, inputs: session.run(None, inputs | dict.fromkeys(names, tau)))
events = json.load(open(session.end_profiling()))
ran = {e["name"] for e in events if e.get("args", {}).get("op_name", "").startswith("DynkFfn")}
print(len({n.removesuffix("_kernel_time") for n in ran}))
assert "torch" not in sys.modules and "skimp" not in sys.modules
""",
    "iree": """
import zipfile
from iree import runtime
index = json.loads(zipfile.ZipFile(path).read("skimp/index.json"))
context = runtime.SystemContext(config=runtime.Config("local-task"))
code = runtime.VmModule.copy_buffer(context.instance, open(path, "rb").read())
context.add_vm_module(code)
def run(tau, inputs):
    taus = [tau] * len(index["taus"])
    got = context.modules.module.main(*taus, *(inputs[n] for n in index["inputs"]))
    return [y.to_host() for y in (got if isinstance(got, (list, tuple)) else [got])]
check(run)
assert "torch" not in sys.modules and "skimp" not in sys.modules
""",
}


def certain(ties, y):
    """The rows of an output of a decoder that no tie can have changed, ``y.shape[:-1]``.

    Args:
        ties: By call of a block, ``[batch, tokens]``; one changes its token and the later ones.
        y: ``[batch, tokens, ..]``, or keys or values with tokens in the dimension before the last,
            of which those that were given come first.
    """
    sure = torch.stack([rows for _, rows in ties]).any(0).cumsum(1) == 0
    if y.dim() == 3:
        return sure
    given = sure.new_ones(y.shape[0], y.shape[2] - sure.shape[1])
    return torch.cat([given, sure], 1).unsqueeze(1).expand(y.shape[:-1])


@torch.no_grad()
def expected(model, tau, kwargs, causal):
    """Outputs of a model, each with its rows that count, ``y.shape[:-1]``.

    Of millions of scores one can tie with its limit, and rounding decides which side it falls. Of
    a ``causal`` model, what comes after such a score is left out; at least half of the rows stay.
    """
    skimp.set_tau(model, tau)
    with watch_ties(model) as ties:
        outputs = run_model(model, kwargs)[1]
    every = [torch.ones(y.shape[:-1], dtype=torch.bool) for y in outputs]
    kept = [certain(ties, y) for y in outputs] if causal else every
    assert all(rows.float().mean() >= 0.5 for rows in kept)
    return list(zip(outputs, kept, strict=True))


def check_fresh(door, model, path, cases, tmp_path, *more, causal=False):
    """Compare every output; ``cases`` are pairs of a threshold and keyword arguments.

    Returns:
        What the process printed.
    """
    arrays = {}
    for i, (tau, kwargs) in enumerate(cases):
        arrays |= {f"{i}<{n}": t.numpy() for n, t in tensors_of(kwargs).items()}
        for j, (y, rows) in enumerate(expected(model, tau, kwargs, causal)):
            arrays |= {f"{i}>{j}": y.numpy(), f"{i}?{j}": rows.numpy()}
        arrays[f"{i}="] = np.float32(tau)
    np.savez(tmp_path / "cases.npz", count=len(cases), **arrays)
    # isolated where it can be: no PYTHONPATH, so nothing of the source tree can be imported
    isolated = [] if door == "pt2" else ["-I"]
    given = [path, tmp_path / "cases.npz", *more]
    command = [sys.executable, *isolated, "-c", CASES + DOORS[door], *map(str, given)]
    got = subprocess.run(command, capture_output=True, text=True, check=False)
    assert got.returncode == 0, got.stderr
    return got.stdout
