"""The converted encoder end to end against eager, torch.compile and ONNX Runtime.

Needs a converted model: `make demo` leaves one in out/model. Every rival runs the dense original
at its best setting, warmed, at the same threads and dtype; runs are interleaved in this process.
"""

import argparse
import json
from copy import deepcopy
from pathlib import Path

import torch
from skimp.codegen.exported import tied_texts
from skimp.ir.measure import agree, compare, machine
from skimp.passes.base import first_tensor
from skimp.passes.data import embedded_text
from skimp.runtime.demo import SHAPES, exactly
from skimp.runtime.models import load_pretrained
from skimp.runtime.ort import onnx_session
from skimp.runtime.store import load


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("out/model"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/encoder.json"))
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    loaded = load_pretrained()
    dense, converted = loaded.model, load(args.model, loaded.model)
    text = embedded_text()[:800]
    session = onnx_session(dense, exactly(loaded.tokenizer, text, 2, 16))
    rows = []
    for batch, length in SHAPES[:2] if args.quick else SHAPES:
        torch._dynamo.reset()
        inputs = exactly(loaded.tokenizer, text, batch, length)
        # Both compiled models are frozen here, so neither has to look at its weights in each call.
        settings = {
            "dynamic": False,
            "options": {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},
        }
        inductor = torch.compile(dense, **deepcopy(settings))
        fast = torch.compile(converted, backend="skimp", **deepcopy(settings))
        want = first_tensor(dense(**inputs))
        agree(first_tensor(inductor(**inputs)), want, "torch.compile", 1e-3)
        agree(torch.from_numpy(session(inputs)[0]), want, "ONNX Runtime", 1e-3)
        own, tied = first_tensor(converted(**inputs)), tied_texts(converted, inputs)
        agree(first_tensor(fast(**inputs)), own, "skimp", 1e-3, tied)
        calls = {
            "eager": lambda: dense(**inputs),  # noqa: B023
            "torch.compile": lambda: inductor(**inputs),  # noqa: B023
            "ONNX Runtime": lambda: session(inputs),  # noqa: B023
            "skimp": lambda: fast(**inputs),  # noqa: B023
        }
        result = compare(calls, "skimp", seconds=8 if args.quick else 25, rest=0.2, warm=3)
        rows.append({"batch": batch, "length": length, **result.as_dict()})
        if not args.json:
            gains = "  ".join(
                f"{n} {s.median:.2f} ({s.low:.2f}-{s.high:.2f})" for n, s in result.speedup.items()
            )
            print(f"{batch:3} x {length:3}: speed of skimp against  {gains}", flush=True)
    result = {
        "machine": machine(),
        "torch": torch.__version__,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
