"""What each ingredient of a conversion is worth: accuracy against FLOPs of the whole model.

The order of D2DMoE's ablation, each variant the same passes with one thing more:

    MoEfication             ReLU, routers of activations (cross-entropy), the same k for every token
    + sparsification        square Hoyer in distillation and fine-tuning
    + norm regression       routers of output norms (squared error)
    + dynamic-k             thresholds in place of a fixed k
    + attention projections query, key, value and output converted too

and three with what is skimp's own: training while experts are skipped (Recover), without and with
projections, and experts allotted to the blocks that can least do without them. All variants of a
seed start from one dense model and get the same training. Thresholds are chosen on data apart from
what is measured. A file per seed and variant lies in --folder: start it again, and it goes on; two
processes may share a folder, one of them with --reverse. What benchmarks/results/ holds of the same
plan is not run again.

    .venv/bin/python benchmarks/ablation.py digits
    .venv/bin/python benchmarks/ablation.py sst2 --seeds 3
"""

import argparse
import copy
import hashlib
import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from ablation_report import write_page
from ablation_tasks import TASKS, Task, accuracy, fit, loss
from skimp.codegen.cpp import kernels
from skimp.ir.cost import write_atomically
from skimp.passes.base import Context, kl_divergence, pooled, watch
from skimp.passes.budget import set_tau, set_top, taus_at
from skimp.passes.convert import fingerprint, prepare
from skimp.passes.finetune import Finetune
from skimp.passes.lift import blocks
from skimp.passes.pipeline import run, spec
from skimp.passes.project import Project
from skimp.passes.quality import whole_model_flops
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Variant:
    """What one line of the ablation is made of."""

    name: str
    title: str
    sparse: bool = True
    norms: bool = True
    static: bool = False
    projections: bool = False
    recover: bool = False
    even: bool = True

    @property
    def base(self):
        """Variants of one base share everything up to the routers."""
        return ("sparse" if self.sparse else "plain") + ("-projected" if self.projections else "")


VARIANTS = [
    Variant("moefication", "MoEfication", sparse=False, norms=False, static=True),
    Variant("sparsity", "+ sparsification", norms=False, static=True),
    Variant("norms", "+ norm regression", static=True),
    Variant("dynamic", "+ dynamic-k"),
    Variant("projections", "+ attention projections", projections=True),
    Variant("recovered", "FFNs, recovered", recover=True),
    Variant(
        "recovered-projections",
        "FFNs and projections, recovered",
        projections=True,
        recover=True,
    ),
    Variant("allotted", "FFNs, experts allotted", even=False),
]


def body(task: Task, v: Variant):
    """The passes before the routers."""
    alpha, tune = (task.alpha, task.tune_alpha) if v.sparse else (0.0, 0.0)
    return [
        *([Project(tokens=task.distil, alpha=0.4 * alpha)] if v.projections else []),
        Relufy(),
        Sparsify(tokens=task.distil, alpha=alpha),
        Finetune(steps=task.finetune, alpha=tune),
        Split(),
    ]


def route(task: Task, v: Variant):
    """The routers, which variants that differ only in what follows share too."""
    return [Route(steps=task.route, predicts="norms" if v.norms else "activations")]


def ending(task: Task, v: Variant):
    """What follows the routers."""
    share = task.projected_share if v.projections else task.recover_share
    recover = Recover(share=share, steps=task.recover, jitter=0.5, even=v.even)
    return [recover] if v.recover else []


@torch.no_grad()
def measure(gm, data, count_zeros):
    """Accuracy, and the experts of each real row by block: their mean, and the standard deviation.

    If asked for, also the share of hidden activations that are exactly zero, of feed-forward
    networks alone: that takes as long as the networks.
    """
    total = {n: [0, 0.0, 0.0] for n in blocks(gm)}
    zeros, count, right, seen = 0.0, 0, 0, 0

    def look(name, block, x):
        nonlocal zeros, count
        k = block.selected(x).sum(-1).double()
        sums = total[name]
        sums[0], sums[1], sums[2] = sums[0] + len(k), sums[1] + k.sum(), sums[2] + (k * k).sum()
        if count_zeros and not block.linear:
            zeros += float((block.hidden(x) == 0).float().mean()) * len(x)
            count += len(x)

    for batch, outputs in watch(gm, data, look):
        right += accuracy(outputs, batch)
        seen += len(batch["labels"])
    mean = {n: float(s / c) for n, (c, s, _) in total.items()}
    std = {n: max(0.0, float(q / c) - mean[n] ** 2) ** 0.5 for n, (c, _, q) in total.items()}
    return right / seen, mean, std, zeros / count if count else None


def curve(task, v, gm, context, data, say):
    """Accuracy at each share of the experts, with the FLOPs of the whole model that are gone."""
    sizes = sorted(data.test, key=lambda b: next(iter(b.values())).numel())
    typical = sizes[len(sizes) // 2]
    points = []
    taus = [None] * len(task.shares) if v.static else taus_at(gm, context, task.shares, even=v.even)
    for i, (share, tau) in enumerate(zip(task.shares, taus, strict=True)):
        if share >= 1:
            set_tau(gm, 0.0)
        elif v.static:
            set_top(gm, share)
        else:
            set_tau(gm, tau)
        score, mean, std, zeros = measure(gm, data.test, share >= 1)
        flops = whole_model_flops(context.teacher, gm, typical, mean)
        point = {
            "share": share,
            "accuracy": score,
            "removed": 1 - flops["whole_share"],
            "zeros": zeros,
            "k_mean": mean,
            "k_std": std,
        }
        points.append(point)
        say("measure", i + 1, len(taus), f"{point['removed']:.0%} removed: {score:.2%}")
    return points


def dense_model(task, seed, data, folder, say):
    """The dense model of a seed, trained once."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    model = task.model()
    options = f"{task.epochs} epochs, lr {task.lr}, {sum(p.numel() for p in model.parameters())}"
    mark = hashlib.sha256(options.encode()).hexdigest()[:8]
    path = folder / f"dense-{mark}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    fit(model, data.train, task.epochs, task.lr, say)
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
    save_file(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return model


def one(task, v, seed, data, model, folder, say):
    """Run one variant on one seed; a stage that another variant shares is taken from the folder."""
    start = time.monotonic()
    teacher, _ = prepare(
        model,
        data.train[0],
        expert_size=task.expert_size,
        router_width=task.router_width,
        projections=v.projections,
        seed=seed,
    )
    student = copy.deepcopy(teacher)
    for block in blocks(teacher).values():
        block.dense = True
    context = Context(
        teacher, data.train, data.held, pooled, say, seed, loss=loss, distance=kl_divergence
    )
    identity = fingerprint(teacher, [*data.train, *data.held], str(seed))
    gm, history = run(body(task, v), student, context, folder=folder / v.base, identity=identity)
    routed = folder / f"{v.base}-{'norms' if v.norms else 'activations'}"
    gm, found = run(route(task, v), gm, context, folder=routed, identity=identity)
    gm, ended = run(ending(task, v), gm, context)
    history = [*history, *found, *ended]
    points = curve(task, v, gm, context, data, say)
    return {
        "points": points,
        "seconds": time.monotonic() - start,
        "history": [{"pass": h["pass"], "seconds": h["seconds"]} for h in history],
        "unexplained": found[0]["stats"]["unexplained variance"],
    }


def progress(json_only):
    last = [0.0]

    def say(stage, done, total, note=""):
        if not json_only and (done == total or time.monotonic() > last[0] + 15):
            last[0] = time.monotonic()
            print(f"  {stage} {done / total:.0%} {note}", flush=True)

    return say


def run_task(task, args):
    """All seeds and variants of a task that are not on disk yet."""
    say = progress(args.json)
    rows, published = [], RESULTS / f"ablation-{task.name}.json"
    known = json.loads(published.read_text())["rows"] if published.exists() else []
    for seed in sorted(range(args.seeds), reverse=args.reverse):
        folder = args.folder / task.name / str(seed)
        data, model, score = None, None, None
        for v in VARIANTS:
            plan = spec([*body(task, v), *route(task, v), *ending(task, v)])
            plan += f" @ {task.shares}, {task.expert_size}, {task.router_width}, {task.epochs}"
            path = folder / f"{v.name}.json"
            found = next((r for r in known if r["variant"] == v.name and r["seed"] == seed), {})
            if found.get("plan") != plan and path.exists():
                found = json.loads(path.read_text())
            if found.get("plan") != plan and args.collect:
                continue
            if found.get("plan") != plan:
                if model is None:
                    print(f"{task.name}, seed {seed}", flush=True)
                    data = task.data(seed)
                    model = dense_model(task, seed, data, folder, say)
                    with torch.no_grad():
                        right = sum(accuracy(model(**inputs(b)), b) for b in data.test)
                    score = right / sum(len(b["labels"]) for b in data.test)
                print(f" {v.title} (dense: {score:.2%})", flush=True)
                found = {"task": task.name, "seed": seed, "variant": v.name, "plan": plan}
                found |= {"dense": score, **one(task, v, seed, data, model, folder, say)}
                write_atomically(path, json.dumps(found, indent=1).encode())
            rows.append(found)
    return rows


def inputs(batch):
    return {n: v for n, v in batch.items() if n != "labels"}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("out/ablation"))
    parser.add_argument("--reverse", action="store_true", help="begin with the last seed")
    parser.add_argument("--collect", action="store_true", help="publish what is there, run nothing")
    parser.add_argument("--json", action="store_true", help="print the results, nothing else")
    parser.add_argument("--page", action="store_true", help="only write docs/ablation.md again")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, of copied graphs
    kernels.install()
    for name in [] if args.page else args.tasks or TASKS:
        task = TASKS[name]
        rows = run_task(task, args)
        result = {
            "task": task.name,
            "title": task.title,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "variants": [asdict(v) for v in VARIANTS],
            "rows": rows,
        }
        text = json.dumps(result, indent=1)
        write_atomically(RESULTS / f"ablation-{name}.json", text.encode())
        if args.json:
            print(text)
    write_page()


if __name__ == "__main__":
    main()
