"""One converted encoder through every door, against the dense one; writes docs/export.md.

Needs a converted model: `make demo` leaves one in out/model. Artefacts are made once and kept in
--folder. Runs are interleaved in this process, at the same threads, on the same inputs; nothing is
timed that disagrees with the model it came from.
"""

import argparse
import json
from pathlib import Path

import skimp
import torch
from page import table
from skimp.codegen.exported import tied_texts
from skimp.codegen.iree import IreeModule
from skimp.codegen.ort import Session
from skimp.ir.measure import agree, compare, machine
from skimp.passes.base import first_tensor
from skimp.passes.data import embedded_text
from skimp.runtime.demo import SHAPES, exactly
from skimp.runtime.models import load_pretrained
from skimp.runtime.ort import FUSED_ATTENTION, onnx_session
from skimp.runtime.store import load

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/export.json", ROOT / "docs/export.md"
DENSE = "dense, ONNX Runtime"
FAST = (".pt2", "ONNX, kernels")


def artefacts(converted, example, folder):
    """Export what is not there yet; loads every artefact and says what each report said."""
    paths = {door: folder / f"model.{door}" for door in ("pt2", "onnx", "vmfb")}
    kept = folder / "reports.json"
    if not kept.exists():
        reports = {
            door: skimp.export(converted, example, path, native=door == "onnx").as_dict()
            for door, path in paths.items()
        }
        for report in reports.values():
            report["file"] = Path(report["file"]).name
        kept.write_text(json.dumps(reports))
    ways = {
        ".pt2": skimp.load(paths["pt2"]),
        "ONNX, functions": Session(paths["onnx"], native=False),
        "ONNX, kernels": Session(paths["onnx"], library=f"{paths['onnx']}.so"),
        "IREE": IreeModule(paths["vmfb"]),
    }
    return ways, json.loads(kept.read_text())


def first(outputs):
    return next(iter(outputs.values()))


def measure(args):
    torch.set_grad_enabled(False)
    loaded = load_pretrained()
    dense, converted = loaded.model, load(args.model, loaded.model)
    text = embedded_text()[:800]
    example = exactly(loaded.tokenizer, text, 2, 16)
    args.folder.mkdir(parents=True, exist_ok=True)
    ways, reports = artefacts(converted, example, args.folder)
    session = onnx_session(dense, example)
    rows = []
    for batch, length in SHAPES[: args.shapes]:
        torch._dynamo.reset()
        inputs = exactly(loaded.tokenizer, text, batch, length)
        settings = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        fast = torch.compile(converted, backend="skimp", dynamic=False, options=settings)
        want, tied = first_tensor(converted(**inputs)), tied_texts(converted, inputs)
        programs = {"torch.compile": lambda: first_tensor(fast(**inputs))}  # noqa: B023
        programs |= {n: lambda w=w: first(w(**inputs)) for n, w in ways.items()}  # noqa: B023
        flipped = {n: agree(p(), want, n, 1e-3, tied) for n, p in programs.items()}
        agree(torch.from_numpy(session(inputs)[0]), first_tensor(dense(**inputs)), DENSE, 1e-3)
        calls = {
            "dense, eager": lambda: dense(**inputs),  # noqa: B023
            DENSE: lambda: session(inputs),  # noqa: B023
            "torch.compile": lambda: fast(**inputs),  # noqa: B023
        } | {n: lambda w=w: w(**inputs) for n, w in ways.items()}  # noqa: B023
        warm = 1 if batch * length > 1000 else 2
        found = compare(calls, DENSE, seconds=args.seconds, rest=0.1, warm=warm)
        rows.append({"batch": batch, "length": length, "flipped": flipped, **found.as_dict()})
        gains = "  ".join(f"{n} {1 / s.median:.2f}" for n, s in found.speedup.items())
        print(f"{batch:3} x {length:3}: times as fast as dense in ORT: {gains}", flush=True)
    index = json.loads((args.model / "skimp.json").read_text())
    result = {
        "machine": machine(),
        "torch": torch.__version__,
        "pipeline": index["record"]["pipeline"],
        "reports": reports,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    return result


INTRO = """# Out of Python

Written by `python benchmarks/export.py`.

`skimp export FOLDER --to pt2|onnx|mlir|iree|safetensors`, or `skimp.export(model, example, path)`,
writes a converted model in a form that other programs run. What is written is loaded again and
compared with the model before it replaces anything; the report says how much of the work is in
converted blocks (`--floor` makes too little an error, `--dry-run` only says it), the error of
every output, and what is needed to run it. Batch and length stay free.

| door | what it is | what runs it | thresholds |
| --- | --- | --- | --- |
| `pt2` | AOTInductor's package with the kernels inside | `skimp.load`, or libtorch alone: \
`examples/cpp/run.cpp` | `set_tau`, or constants named `BLOCK.tau` |
| `onnx` | operators `skimp::DynkFfn_*`, each with a function of standard operators | any ONNX \
Runtime; with the library that `--native` writes, on skimp's kernels | inputs with defaults |
| `mlir` | linalg on tensors, and torch's dialect with whole blocks | a compiler of linalg | \
arguments |
| `iree` | a `.vmfb` for CPUs | IREE's runtime | arguments |
| `safetensors` | weights and settings | skimp and the model's code | `skimp.set_tau` |

A package or a library of kernels is for processors like the one it was made on; one that lacks an
instruction set refuses to load it, and says which. A damaged or truncated file is refused too.

```python
import onnxruntime
import skimp

report = skimp.export(converted, example, "model.onnx", native=True)
session = skimp.load("model.onnx")
session.set_tau(0.2)
print(report.errors, session(**example).keys())

options = onnxruntime.SessionOptions()  # the same without skimp
options.register_custom_ops_library("./model.onnx.so")
onnxruntime.InferenceSession("model.onnx", options)
```

Decoders leave with their cache as tensors, as two programs, one for the prompt and one for the
steps after it:

```py
from skimp.runtime.cached import CachedStep, cached_example

step = CachedStep(skimp.graft(converted, model, example))
for name, past in (("prompt", 0), ("step", 4)):
    example, shapes = cached_example(step, past)
    skimp.export(step, example, f"{name}.onnx", dynamic_shapes=shapes)
```

`AOTInductor` reads inputs by the strides of the example without looking: hand it contiguous
tensors. `skimp.load` does so itself; a C++ program has to.

vLLM and SGLang find skimp by its entry points and take a folder of `skimp.save_pretrained` as one
of their quantization methods. That is experimental: held to their interfaces, not run on a card
yet; networks only, no tensor parallelism.

"""


def ratio(s):
    """Times as fast as dense: the inverse, so quartiles change places."""
    return f"{1 / s['median']:.2f} ({1 / s['high']:.2f}-{1 / s['low']:.2f})"


def ties(rows):
    """Where texts differ by an expert, and how many."""
    found = [
        f"{count} of {r['batch']} of length {r['length']} in {name}"
        for r in rows
        for name, count in r["flipped"].items()
        if count
    ]
    return ", ".join(found) or "none"


def write(result):
    names = list(result["rows"][0]["speedup"])
    rows = [
        [
            f"{r['batch']} x {r['length']}",
            f"{1e3 * r['timings'][DENSE]['median']:.2f}",
            *(ratio(r["speedup"][n]) for n in names),
        ]
        for r in result["rows"]
    ]
    level = [
        f"{name} at {r['batch']} x {r['length']}"
        for r in result["rows"]
        for name in FAST
        if r["speedup"][name]["high"] > 1  # speedups here are of the dense model
    ]
    report = result["reports"]["pt2"]
    text = INTRO + (
        "## What it costs\n\nFrom `benchmarks/results/export.json`. "
        f"all-MiniLM-L6-v2, float32, {result['machine']}, torch {result['torch']}. "
        f"{report['coverage']:.0%} of the FLOPs of its linear layers are in {report['blocks']} "
        f"converted blocks. It was made by `{result['pipeline']}`. How many times as fast as the "
        f"dense model in ONNX Runtime, at opset {FUSED_ATTENTION} for its fused attention, "
        "medians of interleaved runs with quartiles:\n\n"
    )
    text += table(["batch x length", f"{DENSE}, ms", *names], rows)
    text += (
        "\nOf the two doors on kernels, not faster than dense in all of the quartiles: "
        f"{', '.join(level) or 'none'}.\n\n"
    )
    text += (
        "Every program computes what the converted model does, within 1e-3, but for texts in which "
        "a score ties with its limit: there rounding decides whether an expert runs. Such texts: "
        f"{ties(result['rows'])}.\n\n"
    )
    errors = {
        door: max(e["relative"] for e in r["errors"].values())
        for door, r in result["reports"].items()
    }
    text += table(
        ["door", "MB", "largest relative error of an output"],
        [[d, f"{r['bytes'] / 1e6:.1f}", f"{errors[d]:.1e}"] for d, r in result["reports"].items()],
    )
    PAGE.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "out/model")
    parser.add_argument("--folder", type=Path, default=ROOT / "out/export")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--shapes", type=int, default=len(SHAPES))
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    args = parser.parse_args()
    if args.page and not args.out.exists():
        PAGE.write_text(INTRO.rstrip() + "\n")
        return
    result = json.loads(args.out.read_text()) if args.page else measure(args)
    if args.out == RESULT:
        write(result)


if __name__ == "__main__":
    main()
