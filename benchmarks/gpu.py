"""The kernels on a GPU: checked against the reference, then timed against a dense network.

The dense network is the best of eager PyTorch and ``torch.compile``, in the lines that say so with
``mode="max-autotune"``, whose search takes most of a minute a line.
Everything timed is captured in a CUDA graph and replayed in turns; medians with quartiles. Weights
are several copies in rotation, so that few rows read them from memory as in a model, not from the
cache. No speed-up is printed where outputs disagree. Scores are Bernoulli, but in the section
"router", which times routers that kernels take over against routers of PyTorch. Without a GPU only
what the compiler and a cost model say is printed, for every target.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_check import CASES, check, check_machinery
from gpu_timing import bernoulli, block, line, router_line
from skimp.codegen.triton import kernels as K
from skimp.codegen.triton import report
from skimp.codegen.triton.aot import compile_all
from skimp.codegen.triton.launch import run
from skimp.codegen.triton.spec import choose
from skimp.ir.cost import write_atomically

SHAPES = [(384, 1536, False), (768, 3072, False), (576, 1536, True), (2048, 8192, True)]
HELPERS = 14
SHARES = (1.0, 0.7, 0.5, 0.3, 0.2)
PAPER = dict(rows=50432, d=768, d_ff=3072, e=128)
ROOT = Path(__file__).parents[1]


def static(write):
    """What compiler and roofline say of each kernel; with ``write`` into the repository."""
    found = []
    todo = report.configurations()
    if not write:  # in a minute or so
        todo = [(spec, target) for spec, target in todo if spec in (report.PLAIN, report.GATED)]
    for i, (spec, target) in enumerate(todo):
        if sys.stderr.isatty():
            print(f"{i + 1}/{len(todo)} {report.title(spec)} for {target}", file=sys.stderr)
        found += compile_all(spec, target)
    held = report.record(found, __import__("triton").__version__)
    if not write:
        print(report.document(held))
        return
    for path, text in (
        (ROOT / "benchmarks" / "results" / "gpu-static.json", report.to_json(held)),
        (ROOT / "docs" / "kernels.md", report.document(held)),
    ):
        write_atomically(path, text.encode())
        print(path)


def warm(what):
    """Compile the kernels of a line, for later processes to find."""
    d, d_ff, gated, rows, dtype, sizes, _, more = what
    for e in sizes:
        w = block(d, d_ff, e, gated, dtype)
        x = torch.randn(rows, d, device="cuda").to(dtype)
        scores = bernoulli(rows, d_ff // e, 0.5, dtype)
        spec = K._prepare(x, scores, w[:6], e, w[7], more.get("precision", "ieee"))
        for plan in more.get("ways", ()) or [choose(spec, rows)]:
            run(spec, plan, x, scores, torch.tensor(0.5, device="cuda"), *w[:6])
    torch.cuda.synchronize()


def save(result, path):
    """Write the results at once or not at all."""
    write_atomically(path, json.dumps(result, indent=1).encode())


def lines():
    """What is timed, what matters most first: (section, arguments of `line`, more of them)."""
    p, plan = PAPER, []
    shape = (p["d"], p["d_ff"], False, p["rows"])
    for dtype, precision, ways in (
        (torch.bfloat16, "ieee", ("lists", "pairs", "masked", "blocks")),
        (torch.float32, "ieee", ("lists", "pairs")),
        (torch.float32, "tf32x3", ("pairs",)),
        (torch.float32, "tf32", ("lists", "pairs")),
    ):
        more = dict(precision=precision, ways=ways, autotune=precision == "ieee")
        plan.append(("paper", (*shape, dtype, [p["e"]], SHARES), more))
    for batch in (1, 8, 32):
        for d, d_ff in ((2048, 8192), (4096, 14336)):
            plan.append(("decode", (d, d_ff, True, batch, torch.bfloat16, [8, 128], SHARES), {}))
    for rows in (1, 16, 2048, 4, 256, 16384):
        for d, d_ff, gated in SHAPES:
            autotune = (d == 768 and rows in (1, 16, 2048)) or (d == 2048 and rows == 2048)
            plan.append(("table", (d, d_ff, gated, rows, torch.bfloat16, [8, 128],
                                   (1.0, 0.5, 0.3, 0.2)), dict(autotune=autotune)))  # fmt: skip
    for rows in (1, 16, 50432):
        for d, d_ff, e in ((768, 3072, 128), (2048, 8192, 128)):
            plan.append(("router", (d, d_ff, e, 128, rows), {}))
    return plan


def helper(i):
    """One of several processes: compile every HELPERS-th line; the first ones also check a case."""
    if i < len(CASES):
        print(json.dumps(check(CASES[i])))
    for section, what, more in lines()[i::HELPERS]:
        if section != "router":
            warm((*what, more))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--static", action="store_true", help="write what compilers say, time nothing"
    )
    parser.add_argument("--only", default="check,paper,decode,router,table")
    parser.add_argument("--seconds", type=float, default=480, help="start no line after so many")
    parser.add_argument("--helper", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.static or not torch.cuda.is_available():
        if not args.static:
            print("No GPU here, so nothing is timed.\n")
        static(args.static)
        return
    torch.set_grad_enabled(False)
    if args.helper is not None:
        helper(args.helper)
        return
    begin, parts = time.monotonic(), args.only.split(",")
    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__,
                  triton=__import__("triton").__version__, scores="bernoulli")  # fmt: skip
    if "check" in parts:
        # compiling takes most of the time, and has many processors to take it on
        command = [sys.executable, "-W", "ignore", __file__, "--helper"]
        helpers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True)
                   for i in range(HELPERS)]  # fmt: skip
        said = [h.communicate()[0] for h in helpers]
        if any(h.returncode for h in helpers):
            raise SystemExit("a check failed; nothing is timed")
        errors = [json.loads(text) for text in said[: len(CASES)]]
        result["worst_errors"] = {k: max(e.get(k, 0.0) for e in errors)
                                  for k in sorted({k for e in errors for k in e})}  # fmt: skip
        print("checked against the reference:", result["worst_errors"], flush=True)
        result["machinery"] = check_machinery()
        print("checked:", "; ".join(result["machinery"]), flush=True)
        print(f"{time.monotonic() - begin:.0f} s", flush=True)
    for section, what, more in lines():
        if section not in parts:
            continue
        if time.monotonic() - begin > args.seconds:
            result.setdefault("not_timed", []).append([section, *map(str, what[:5])])
            continue
        precise = "high" if more.get("precision") == "tf32" else "highest"
        torch.set_float32_matmul_precision(precise)  # of the dense network: what its kernels have
        try:
            timed = router_line(*what) if section == "router" else line(*what, **more)
            result.setdefault(section, []).append(timed)
        except AssertionError as disagreement:  # no figure without the right output
            result.setdefault("refused", []).append(str(disagreement))
            print("REFUSED:", disagreement, flush=True)
        torch.cuda.empty_cache()
        if args.out:
            save(result, args.out)
    if args.out:
        save(result, args.out)
    print(f"{time.monotonic() - begin:.0f} s; not timed: {result.get('not_timed', [])}")
    if "refused" in result:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
