"""The page of the ablation, docs/ablation.md, and its figures, from benchmarks/results/."""

import io
import json
import statistics
from itertools import pairwise
from pathlib import Path

from page import table
from skimp.ir.cost import write_atomically

ROOT = Path(__file__).parents[1]
LEVELS = (0.3, 0.4, 0.45, 0.5, 0.55)
ORDER = ("moefication", "sparsity", "norms", "dynamic", "projections")

HEAD = """\
# What each ingredient is worth

Written by `benchmarks/ablation.py`; nothing here is typed. Each variant is the same passes with one
thing more, in the order of the D2DMoE paper:

1. **MoEfication**: activations become ReLU, experts are split, routers predict how active each
   expert is (binary cross-entropy), and every token runs the same number of experts.
2. **+ sparsification**: the square Hoyer term, in distillation and in fine-tuning.
3. **+ norm regression**: routers predict the L2 norm of each expert's output (squared error).
4. **+ dynamic-k**: the experts that reach a threshold run, so tokens differ in how many.
5. **+ attention projections**: query, key, value and output are converted too.

Three variants stand beside that order, with what is skimp's own. **Experts allotted**: each block
gets the share of its experts that it can least do without, where otherwise all blocks have the
same. The two **recovered** ones add the last stage of a conversion, training while experts are
skipped, to dynamic-k without and with projections. Within a seed all start from one dense model and
see the same number of training steps at each stage. FLOPs are those of the whole model, matrix
products and attention, routers included. Thresholds were set on data that is neither trained nor
measured on. Between measured points accuracy is interpolated.
"""


class Curves:
    """Loss of accuracy against removed FLOPs, by variant and seed."""

    def __init__(self, result):
        self.result = result
        self.titles = {v["name"]: v["title"] for v in result["variants"]}
        self.rows = {(r["variant"], r["seed"]): r for r in result["rows"]}
        self.seeds = sorted({r["seed"] for r in result["rows"]})
        self.names = [n for n in self.titles if all((n, s) in self.rows for s in self.seeds)]

    def loss(self, name, seed, level):
        """Points of accuracy lost at a level of removed FLOPs; ``None`` outside what was run."""
        row = self.rows[name, seed]
        points = sorted((p["removed"], p["accuracy"]) for p in row["points"])
        for (x0, y0), (x1, y1) in pairwise(points):
            if x0 <= level <= x1:
                y = y0 + (y1 - y0) * (level - x0) / max(x1 - x0, 1e-9)
                return 100 * (row["dense"] - y)
        return None

    def at(self, name, level):
        """The same of every seed; ``None`` where one is missing."""
        found = [self.loss(name, s, level) for s in self.seeds]
        return None if None in found else found

    def most(self, name, points=1.0):
        """Most FLOPs removed, in steps of half a percent, at which the mean loss is allowed."""
        levels = [i / 200 for i in range(1, 200)]
        kept = [(lv, self.at(name, lv)) for lv in levels]
        good = [lv for lv, loss in kept if loss is not None and statistics.mean(loss) <= points]
        return max(good, default=None)


def spread(values, sign=""):
    if values is None:
        return "-"
    mean = f"{statistics.mean(values):{sign}.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def count(seeds):
    return "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"


def verdict(differences):
    if len(differences) == 1:
        return "one seed says nothing of the spread"
    if min(differences) > 0:
        return "better in every seed"
    if max(differences) < 0:
        return "**worse** in every seed"
    return "not separable"


def steps(c, level):
    """Each ingredient against the line before it, seed by seed."""
    rows = []
    for before, after in pairwise(ORDER):
        if before not in c.names or after not in c.names:
            continue
        a, b = c.at(before, level), c.at(after, level)
        if a is None or b is None:
            rows.append([c.titles[after], "-", "-", "not measured at this level"])
            continue
        gain = [x - y for x, y in zip(a, b, strict=True)]
        each = ", ".join(f"{g:+.2f}" for g in gain)
        rows.append([c.titles[after], spread(gain, "+"), each, verdict(gain)])
    return rows


def full(c, name, key):
    """A figure of every seed where all experts run."""
    return [next(p[key] for p in c.rows[name, s]["points"] if p["share"] >= 1) for s in c.seeds]


def lost_by_all(c, name):
    """Points of accuracy lost by every seed where all experts run."""
    kept = zip(c.seeds, full(c, name, "accuracy"), strict=True)
    return [100 * (c.rows[name, seed]["dense"] - accuracy) for seed, accuracy in kept]


def facts(c):
    """What the acceptance checks of the method ask for."""
    lines = []
    if {"moefication", "dynamic"} <= set(c.names):
        plain, sparse = (full(c, n, "zeros") for n in ("moefication", "dynamic"))
        before, after = (full(c, n, "accuracy") for n in ("moefication", "dynamic"))
        change = [100 * (a - b) for a, b in zip(after, before, strict=True)]
        gain = [100 * (a - b) for a, b in zip(sparse, plain, strict=True)]
        lines.append(
            f"- Exact zeros in the hidden activations: {100 * statistics.mean(plain):.1f} % "
            f"without the Hoyer term, {100 * statistics.mean(sparse):.1f} % with it "
            f"({spread(gain, '+')} points); accuracy with every expert changes by "
            f"{spread(change, '+')} points."
        )
    if "dynamic" in c.names:
        shown = []
        for seed in c.seeds:
            point = min(c.rows["dynamic", seed]["points"], key=lambda p: abs(p["share"] - 0.25))
            shown += [point["k_std"][n] / point["k_mean"][n] for n in point["k_mean"]]
        lines.append(
            "- Experts per token vary: where a quarter runs on average, the standard deviation of "
            f"k over tokens is {100 * min(shown):.0f} to {100 * max(shown):.0f} % of its mean, by "
            "block."
        )
    for ffn, both in (("dynamic", "projections"), ("recovered", "recovered-projections")):
        if {ffn, both} <= set(c.names):
            a, b = c.most(ffn), c.most(both)
            if a is None or b is None:
                lines.append(
                    f"- {c.titles[both]}: within one point of the dense accuracy "
                    f"{'nothing' if b is None else f'{100 * b:.1f} %'} of the FLOPs can go, with "
                    f"FFNs alone {'nothing' if a is None else f'{100 * a:.1f} %'}."
                )
                continue
            lines.append(
                f"- {c.titles[both]}: within one point of the dense accuracy {100 * b:.1f} % of "
                f"the FLOPs go, with FFNs alone {100 * a:.1f} %: {100 * (b - a):+.1f} points."
            )
    return "\n".join([*lines, *reasons(c)]) + "\n"


def reasons(c):
    """Why an ingredient does not gain, where what was measured tells."""
    lines, level = [], 0.3
    if "dynamic" in c.names and (lost := c.at("dynamic", level)) is not None:
        skipped = statistics.mean(lost) - statistics.mean(lost_by_all(c, "dynamic"))
        if len(lost) > 1 and skipped < statistics.stdev(lost):
            lines.append(
                f"- Why routing gains little at {level:.0%}: skipping costs {skipped:.2f} points "
                f"there, less than seeds differ by ({statistics.stdev(lost):.2f})."
            )
    if {"dynamic", "projections"} <= set(c.names):
        a, b = (lost_by_all(c, n) for n in ("dynamic", "projections"))
        cost = [y - x for x, y in zip(a, b, strict=True)]
        linear, network = unexplained(c, "projections")
        lines.append(
            "- Why projections gain less than they cost: a linear layer is not the network that "
            f"replaces it, which loses {spread(cost, '+')} points with every expert running; and "
            f"what its experts add is harder to predict: routers leave {linear:.0%} of its "
            f"variance unexplained, those of FFNs {network:.0%} (medians over blocks)."
        )
    return lines


def unexplained(c, name):
    """Median over blocks and seeds of what routers leave unexplained: projections', and FFNs'."""
    found = {True: [], False: []}
    for seed in c.seeds:
        for block, share in c.rows[name, seed]["unexplained"].items():
            found["attention" in block].append(share)
    return statistics.median(found[True]), statistics.median(found[False])


def section(result):
    c = Curves(result)
    dense = [next(r["dense"] for (_, s), r in c.rows.items() if s == seed) for seed in c.seeds]
    text = f"\n## {result['title']}\n\n"
    text += f"Dense accuracy {spread([100 * d for d in dense])} % over {count(c.seeds)}"
    text += f" (`benchmarks/results/ablation-{result['task']}.json`).\n\n"
    missing = [c.titles[v["name"]] for v in result["variants"] if v["name"] not in c.names]
    if missing:
        text += f"**Not complete**; still to be run on these seeds: {', '.join(missing)}.\n\n"
    text += f"![accuracy against FLOPs](ablation-{result['task']}.svg)\n\n"
    text += "Points of accuracy lost at so many FLOPs removed, mean ± standard deviation:\n\n"
    head = ["", *(f"{lv:.0%}" for lv in LEVELS), "most removed at ≤ 1 point", "every expert"]
    rows = []
    for name in c.names:
        most = c.most(name)
        cells = [spread(c.at(name, lv)) for lv in LEVELS]
        cells += ["-" if most is None else f"{100 * most:.1f} %", spread(lost_by_all(c, name))]
        rows.append([c.titles[name], *cells])
    text += table(head, rows) + "\n"
    for level in (0.3, 0.45):
        found = steps(c, level)
        text += f"What each ingredient gains at {level:.0%} removed, in points of accuracy:\n\n"
        text += table(["", "mean ± deviation", "seeds", ""], found) + "\n"
    minutes = sum(r["seconds"] for r in result["rows"]) / 60
    text += facts(c)
    text += f"- All seeds and variants took {minutes:.0f} minutes on {result['threads']} threads, "
    text += "the dense models not counted.\n"
    return text


def figure(result):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "skimp"
    from matplotlib import pyplot as plt

    c = Curves(result)
    picture, axes = plt.subplots(figsize=(7, 4.2))
    for name in c.names:
        rows = [c.rows[name, s] for s in c.seeds]
        x, y, low, high = [], [], [], []
        for points in zip(*(r["points"] for r in rows), strict=True):
            lost = [100 * (r["dense"] - p["accuracy"]) for r, p in zip(rows, points, strict=True)]
            x.append(100 * statistics.mean(p["removed"] for p in points))
            y.append(statistics.mean(lost))
            low.append(min(lost))
            high.append(max(lost))
        style = "--" if name.startswith("recovered") else "-"
        (line,) = axes.plot(x, y, style, marker="o", ms=3, label=c.titles[name])
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)
    axes.axhline(1, color="0.6", lw=1)
    axes.set_ylim(12, -2)
    axes.set_xlim(0, 85)
    axes.set_xlabel("FLOPs of the whole model removed, %")
    axes.set_ylabel("points of accuracy lost")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.set_title(f"{result['title']}, {count(c.seeds)} (bands: range)", fontsize=10)
    picture.tight_layout()
    buffer = io.BytesIO()
    picture.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(picture)
    return buffer.getvalue()


def write_page():
    """Write the page and the figures of every task that has results."""
    text = HEAD
    for name in ("sst2", "digits"):
        path = ROOT / "benchmarks" / "results" / f"ablation-{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        write_atomically(ROOT / "docs" / f"ablation-{name}.svg", figure(result))
        text += section(result)
    write_atomically(ROOT / "docs" / "ablation.md", text.encode())
