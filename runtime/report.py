"""One self-contained HTML file: each picture with the table behind it. Nothing is loaded by it."""

import html
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..ir.cost import write_atomically

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#1b1f24;background:#fff}h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.4rem}
table{border-collapse:collapse;margin:.6rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .8rem;border-bottom:1px solid #d8dee4;text-align:right}
td:first-child,th:first-child{text-align:left}.big{display:flex;gap:2.5rem;flex-wrap:wrap}
.big b{display:block;font-size:2rem;font-weight:600}svg{max-width:100%;height:auto}
summary{cursor:pointer;color:#57606a}pre{overflow:auto;font-size:.8rem}
"""


def write_report(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json``.

    Args:
        result: What :func:`skimp.runtime.demo.demo` returned.
        folder: Made if need be.

    Returns:
        The two paths.
    """
    page, data = folder / "report.html", folder / "report.json"
    write_atomically(data, json.dumps(result, indent=1).encode())
    write_atomically(page, render(result).encode())
    return page, data


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that matter first, as (value, what it is)."""
    q, f = result["quality"], result["flops"]
    rows = [
        (f"{1 - f['ffn_share']:.0%}", "of FFN FLOPs removed, routers included"),
        (f"{1 - f['whole_share']:.0%}", "of whole-model FLOPs removed"),
        (f"{q['cosine']:.3f}", "cosine to the dense embedding, held-out text"),
        (f"{q['overlap']:.2f}", "overlap of the ten nearest neighbours"),
    ]
    for name in ("eager", "torch.compile", "ONNX Runtime"):
        gains = [r["speedup"][name]["median"] for r in result["latency"] if name in r["speedup"]]
        if gains:
            rows.append((f"{min(gains):.2f}-{max(gains):.2f}x", f"the speed of {name}"))
    return rows


def render(result: dict[str, Any]) -> str:
    """The page as text."""
    title = f"skimp on {html.escape(str(result['model']))}"
    big = "".join(f"<div><b>{v}</b>{html.escape(w)}</div>" for v, w in headline(result))
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
        f"<h1>{title}</h1><p>{_how(result)}</p><div class=big>{big}</div>",
        _curve(result["curve"], result["quality"]),
        _latency(result["latency"], result["onnx_missing"]),
        _profile(result["profile"]),
        _layers(result["layers"]),
        _histograms(result["layers"]),
        _history(result["history"]),
        "<details><summary>Blocks</summary><pre>"
        + html.escape("\n".join(result["blocks"]))
        + "</pre></details></html>",
    ]
    return "\n".join(parts)


def _how(result: dict[str, Any]) -> str:
    text = result["text"]
    return html.escape(
        f"Converted without labels on {text['train_tokens']:,} tokens; quality on "
        f"{text['test_passages']} passages never trained on. torch {result['torch']}, "
        f"{result['threads']} threads, float32, {result['seconds']:.0f} s in all."
    )


def _curve(curve: Sequence[dict[str, float]], quality: dict[str, Any]) -> str:
    figure, axes = _figure(6.4, 3.6)
    x = [100 * p["flops"] for p in curve]
    axes.plot(x, [p["cosine"] for p in curve], "o-", label="cosine to dense")
    axes.plot(x, [p["overlap"] for p in curve], "s--", label="top-10 overlap")
    axes.axvline(100 * quality["flops"], color="0.6", lw=1)
    axes.annotate("chosen", (100 * quality["flops"], axes.get_ylim()[0]), fontsize=8, color="0.4")
    axes.set_xlabel("FFN FLOPs left, % (routers included)")
    axes.legend(frameon=False)
    rows = [
        [f"{p['share']:.0%}", f"{p['flops']:.1%}", f"{p['cosine']:.4f}", f"{p['overlap']:.4f}"]
        for p in curve
    ]
    head = ["experts active", "FFN FLOPs", "cosine", "overlap"]
    return "<h2>Quality against cost</h2>" + _svg(figure) + _table(head, rows)


def _latency(latency: Sequence[dict[str, Any]], missing: Sequence[str]) -> str:
    names = list(latency[0]["timings"])
    figure, axes = _figure(6.4, 3.4)
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        base = [r["timings"][names[0]]["median"] for r in latency]
        t = [r["timings"][name] for r in latency]
        middle = [x["median"] / b for x, b in zip(t, base, strict=True)]
        low = [(x["median"] - x["low"]) / b for x, b in zip(t, base, strict=True)]
        high = [(x["high"] - x["median"]) / b for x, b in zip(t, base, strict=True)]
        at = [i + j * width for i in range(len(latency))]
        axes.bar(at, middle, width * 0.9, yerr=[low, high], capsize=2, label=name)
    ticks = [i + 0.4 - width / 2 for i in range(len(latency))]
    axes.set_xticks(ticks, [f"{r['batch']} x {r['length']}" for r in latency])
    axes.set_ylabel(f"time / {names[0]}")
    axes.set_xlabel("batch x length")
    axes.legend(frameon=False)
    others = [n for n in names if n != latency[0]["subject"]]
    rows = [
        [f"{r['batch']} x {r['length']}"]
        + [f"{1000 * r['timings'][n]['median']:.1f}" for n in names]
        + [
            f"{r['speedup'][n]['median']:.2f} "
            f"({r['speedup'][n]['low']:.2f}-{r['speedup'][n]['high']:.2f})"
            for n in others
        ]
        for r in latency
    ]
    head = ["batch x length", *[f"{n}, ms" for n in names], *[f"speed against {n}" for n in others]]
    note = "<p>Interleaved runs; medians, quartiles in brackets and as whiskers. "
    if missing:
        note += f"ONNX Runtime was not timed: install {html.escape(', '.join(missing))}."
    else:
        note += (
            "ONNX Runtime is timed against skimp apart, 0.2 s between turns, since its threads "
            "spin on after a call."
        )
    note += "</p>"
    return "<h2>Latency</h2>" + _svg(figure) + note + _table(head, rows)


def _profile(profile: Sequence[dict[str, Any]]) -> str:
    figure, axes = _figure(6.4, 0.9 + 0.5 * len(profile))
    names = [f"{r['batch']} x {r['length']}" for r in profile]
    left = [0.0] * len(profile)
    for kind in profile[0]["seconds"]:
        share = [100 * r["seconds"][kind] / sum(r["seconds"].values()) for r in profile]
        axes.barh(names, share, left=left, height=0.6, label=kind)
        left = [a + b for a, b in zip(left, share, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("time of a call, %")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    rows = [
        [
            kind,
            *(
                f"{1000 * r['seconds'][kind]:.2f} "
                f"({r['seconds'][kind] / sum(r['seconds'].values()):.0%})"
                for r in profile
            ),
        ]
        for kind in profile[0]["seconds"]
    ]
    head = ["kind of work", *(f"{n}, ms" for n in names)]
    note = (
        "<p>The converted, compiled model under torch.profiler. Routers count as linear layers, "
        "unless a kernel has taken them in; between kernels are Python, guards, allocation and "
        "the profiler itself.</p>"
    )
    return "<h2>What is left</h2>" + _svg(figure) + note + _table(head, rows)


def _layers(layers: Sequence[dict[str, Any]]) -> str:
    figure, axes = _figure(6.4, 2.8)
    at = range(len(layers))
    axes.bar([i - 0.2 for i in at], [100 * r["zeros"] for r in layers], 0.38, label="zero neurons")
    idle = [100 * (1 - r["k_mean"] / r["experts"]) for r in layers]
    axes.bar([i + 0.2 for i in at], idle, 0.38, label="experts skipped")
    axes.set_xticks(list(at))
    axes.set_xlabel("block")
    axes.set_ylabel("%")
    axes.legend(frameon=False)
    rows = [
        [r["name"], f"{r['zeros']:.1%}", f"{r['tau']:.3f}", f"{r['k_mean']:.0f} / {r['experts']}"]
        for r in layers
    ]
    head = ["block", "zero neurons", "tau", "mean k"]
    return "<h2>Sparsity per block</h2>" + _svg(figure) + _table(head, rows)


def _histograms(layers: Sequence[dict[str, Any]]) -> str:
    figure, axes = _figure(6.4, 3.0)
    for i, r in enumerate(layers):
        n = len(r["k_histogram"])
        x = [(j + 0.5) / n * 100 for j in range(n)]
        axes.plot(x, [100 * v for v in r["k_histogram"]], label=f"block {i}")
    axes.set_xlabel("experts that a token runs, %")
    axes.set_ylabel("tokens, %")
    axes.legend(frameon=False, fontsize=8)
    rows = [[r["name"], f"{r['k_mean']:.1f}", f"{r['k_std']:.1f}"] for r in layers]
    head = ["block", "mean k", "standard deviation"]
    return "<h2>Experts per token</h2>" + _svg(figure) + _table(head, rows)


def _history(history: Sequence[dict[str, Any]]) -> str:
    rows = [[r["pass"], f"{r['seconds']:.1f}"] for r in history]
    return "<h2>Passes</h2>" + _table(["pass", "seconds"], rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(r, 'td') for r in rows)}</table>"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "skimp"}):  # else names differ from run to run
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
