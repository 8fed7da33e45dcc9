"""The page docs/koala.md, from what benchmarks/koala.py measured."""

import statistics
from pathlib import Path

from page import table


def write_page(result):
    head = Path(__file__).with_name("koala_page.md").read_text()
    parts = [head, _training(result) if "arms" in result else "", _timing(result.get("timing"))]
    Path("docs/koala.md").write_text("\n".join(filter(None, parts)))


def _spread(values):
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.4f} ({low:.4f}-{high:.4f})"


def _training(result):
    held, steps = result["held out"], result["steps"]
    rows = [[n, "", f"{e['task']:.4f}", f"{e['teacher']:.4f}"] for n, e in held.items()]
    for arm, runs in result["arms"].items():
        runs = list(runs.values())
        rows.append(
            [
                arm,
                runs[0]["taps"],
                _spread([r["task"] for r in runs]),
                _spread([r["teacher"] for r in runs]),
            ]
        )
    p = result["student"]["parameters"]
    count = len(next(iter(result["arms"].values())))
    head = ["losses", "taps", "error to the noise", "error to the teacher"]
    return (
        "## Which losses help\n\n"
        f"A teacher in SDXL's layout ({p['teacher']:,} parameters, 16x16 pixels) was trained for "
        f"{steps['teacher']:,} steps on {result['pictures'][0]} OpenMoji pictures with their "
        f"Unicode names, and pruned as `koala-700m` to {p['student']:,} parameters "
        f"({p['left']:.0%}). Each student then took {steps['student']} steps of "
        f"{steps['batch']} pictures. Mean squared errors on {result['pictures'][1]} pictures that "
        f"none of them saw; mean and range over {count} seeds, equal steps, not equal time.\n\n"
        f"{table(head, rows)}\n"
        f"{_says(result)}\n\n"
        "![Samples](koala.png)\n\n"
        "Rows: the real pictures, then in the order of the table, first seed, 20 Euler steps from "
        "the same noise. A toy: it says in which direction the losses pull at this size and "
        "budget, and nothing of SDXL.\n"
    )


def _says(result):
    """What came out, in words, from the figures."""
    arms = {
        a: statistics.mean(r["teacher"] for r in runs.values())
        for a, runs in result["arms"].items()
    }
    order = sorted(arms, key=arms.get)
    ranges = {a: [r["teacher"] for r in runs.values()] for a, runs in result["arms"].items()}
    first, second = order[:2]
    apart = max(ranges[first]) < min(ranges[second])
    text = f"Nearest to the teacher: `{first}`, then `{second}`; their ranges "
    text += "do not overlap." if apart else "overlap, so this order is not established."
    bottom, up = (
        next(a for a in arms if a.startswith("+") and a.endswith(e)) for e in ("bottom", "up")
    )
    word = "nearer than" if arms[bottom] < arms[up] else "no nearer than"
    sure = max(ranges[bottom]) < min(ranges[up]) or max(ranges[up]) < min(ranges[bottom])
    text += f" Taps from the bottom came out {word} taps from the top, "
    text += "in every seed." if sure else "with overlapping ranges."
    apart = max(ranges[bottom]) < min(ranges["+ output"])
    text += " Against the output's error alone, taps from the bottom "
    return text + ("came out nearer in every seed." if apart else "gained nothing that shows.")


def _timing(timing):
    if not timing:
        return ""
    rows = timing["rows"]
    teacher = rows["teacher"]
    lines = [
        [
            name,
            f"{r['parameters'] / 1e6:.1f}",
            f"{r['gmac']:.2f}",
            f"{teacher['gmac'] / r['gmac']:.2f}x",
            f"{r['seconds']['median'] * 1e3:.0f} "
            f"({r['seconds']['low'] * 1e3:.0f}-{r['seconds']['high'] * 1e3:.0f})",
            f"{teacher['seconds']['median'] / r['seconds']['median']:.2f}x",
            f"{r['peak MB']:.0f}",
        ]
        for name, r in rows.items()
    ]
    head = ["", "parameters, M", "GMAC", "predicted", "ms per step", "measured", "peak, MB"]
    return (
        "## What a step costs\n\n"
        f"One denoising step, batch 1, at width 64 with SDXL's depths, {timing['size']}x"
        f"{timing['size']} latents, random weights (time does not depend on them), float32 on "
        f"{timing['machine']}. Interleaved; median and quartiles. `predicted` is the ratio of "
        "multiply-adds. The number of steps is the same for all: a student distilled from a "
        "teacher of fewer steps takes fewer, which is another gain and is not counted here. Peak "
        "is the rise of resident memory of a process that loads the model and takes one step.\n\n"
        f"{table(head, lines)}"
    )
