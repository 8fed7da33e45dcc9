"""The report of a load sweep or a frontier: one self-contained HTML file."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..ir.cost import write_atomically
from .economics import Machine, frontier
from .report import _STYLE, _figure, _svg, _table


def write_page(
    path: Path,
    *,
    sweeps: Sequence[Mapping[str, Any]] = (),
    points: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the page.

    Args:
        path: Of the HTML file.
        sweeps: Records of :func:`skimp.runtime.economics.sweep_record`, with ``zone`` and ``slo``.
        points: Models with ``name``, ``cost``, ``quality`` and perhaps ``latency``.
    """
    title = "Economics of serving"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
        f"<h1>{title}</h1>",
        *(_sweep(s) for s in sweeps),
    ]
    if not points and sweeps:
        points = [_levels_as_points(s, row) for s in sweeps for row in s["curves"]]
        heading = "Frontier of cost and speed"
    else:
        heading = "Production frontier"
    if points:
        parts.append(f"<h2>{heading}</h2>" + _frontier(points))
    write_atomically(path, "\n".join([*parts, "</html>"]).encode())
    return path


def _levels_as_points(record: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    name = f"{record['name']}, n = {row['concurrency']}"
    return {"name": name, "cost": row["average_cost"], "latency": row["seconds"]}


def _sweep(record: Mapping[str, Any]) -> str:
    rows = record["curves"]
    n = [r["concurrency"] for r in rows]
    zone = record.get("zone", [])
    cost, axes = _figure(6.4, 3.4)
    axes.plot(n, [r["average_cost"] for r in rows], "o-", label="average")
    low = [r["average_cost_interval"][0] for r in rows]
    high = [r["average_cost_interval"][1] for r in rows]
    axes.fill_between(n, low, high, alpha=0.2)
    marginal = [(r["concurrency"], r["marginal_cost"]) for r in rows if r["marginal_cost"]]
    axes.plot([m[0] for m in marginal], [m[1] for m in marginal], "s--", label="marginal")
    _by_concurrency(axes, n, zone, "US dollars per request")
    speed, axes = _figure(6.4, 3.4)
    axes.plot(n, [r["tokens_per_second"] for r in rows], "o-", label="tokens per second")
    _by_concurrency(axes, n, zone, "tokens per second")
    other = axes.twinx()
    other.plot(n, [r["ttft"] for r in rows], "s--", color="C1", label="seconds to first token")
    low = [r["ttft_interval"][0] for r in rows]
    high = [r["ttft_interval"][1] for r in rows]
    other.fill_between(n, low, high, alpha=0.2, color="C1")
    other.set_ylabel("seconds to first token")
    other.set_ylim(bottom=0)
    axes.legend(
        handles=[*axes.get_lines(), *other.get_lines()], frameon=False, loc="upper left", fontsize=8
    )
    head = ["n", "requests/s", "tokens/s", "first token, s", "last token, s", "$ per request"]
    head += ["elasticity"]
    table = [
        [
            str(r["concurrency"]),
            _with(r, "rate"),
            f"{r['tokens_per_second']:,.0f}",
            _with(r, "ttft"),
            _with(r, "seconds"),
            _with(r, "average_cost"),
            "" if r["elasticity"] is None else f"{r['elasticity']:.2f}",
        ]
        for r in rows
    ]
    return (
        f"<h2>{html.escape(str(record['name']))}</h2><p>{html.escape(_how(record))}</p>"
        + _svg(cost)
        + _svg(speed)
        + _table(head, table)
    )


def _with(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3g} ({low:.3g}-{high:.3g})"


def _how(record: Mapping[str, Any]) -> str:
    text = f"${record['hourly']:.4f} per hour"
    if machine := record.get("machine"):
        terms = ", ".join(f"{k} ${v:.4f}" for k, v in machine["terms"].items())
        inputs = {k: v for k, v in machine.items() if k != "terms"}
        text += f" ({terms}; from {', '.join(f'{k} {v:g}' for k, v in inputs.items())})"
        rates = ((u, Machine(**{**inputs, "utilisation": u}).hourly) for u in (0.3, 0.9))
        text += "; by utilisation " + ", ".join(f"${r:.4f} at {u:g}" for u, r in rates)
    slo = record.get("slo")
    told = "" if slo is None or math.isinf(slo) else f" with the first token within {slo:g} s"
    zone = record.get("zone", [])
    if zone:
        text += f". Cost-effective{told} at n = {', '.join(map(str, zone))} (shaded)."
    else:
        text += f". No concurrency is cost-effective{told}."
    return text + " Bands and brackets are 95 % bootstrap intervals over requests."


def _by_concurrency(axes: Any, n: Sequence[int], zone: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [str(v) for v in n])
    axes.minorticks_off()
    axes.set_xlabel("requests under way, n")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    if zone:
        axes.axvspan(min(zone) / 1.1, max(zone) * 1.1, color="0.5", alpha=0.12, lw=0)
    axes.legend(frameon=False)


def _frontier(points: Sequence[Mapping[str, Any]]) -> str:
    """Cost against quality, or against latency where quality was not measured."""
    has_quality = all("quality" in p for p in points)
    has_latency = all("latency" in p for p in points)
    cost = [float(p["cost"]) for p in points]
    y = [float(p["quality" if has_quality else "latency"]) for p in points]
    good = y if has_quality else [-v for v in y]
    latency = [float(p["latency"]) for p in points] if has_latency and has_quality else None
    kept = frontier(cost, good, latency)
    figure, axes = _figure(6.4, 3.6)
    axes.scatter(
        [c for c, k in zip(cost, kept, strict=True) if not k],
        [v for v, k in zip(y, kept, strict=True) if not k],
        color="0.6",
        label="dominated",
    )
    best = sorted((c, v) for c, v, k in zip(cost, y, kept, strict=True) if k)
    axes.plot([b[0] for b in best], [b[1] for b in best], "o-", label="frontier")
    for p, c, v in zip(points, cost, y, strict=True):
        axes.annotate(str(p["name"]), (c, v), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel("cost, US dollars")
    axes.set_ylabel("quality" if has_quality else "seconds")
    axes.margins(x=0.15)
    axes.legend(frameon=False)
    head = ["name", "cost", *(["quality"] * has_quality), *(["seconds"] * has_latency), ""]
    table = [
        [
            str(p["name"]),
            f"{p['cost']:.4g}",
            *([f"{p['quality']:.4g}"] if has_quality else []),
            *([f"{p['latency']:.4g}"] if has_latency else []),
            "frontier" if k else "",
        ]
        for p, k in zip(points, kept, strict=True)
    ]
    return _svg(figure) + _table(head, table)
