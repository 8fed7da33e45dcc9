"""The commands around costs: ``skimp economics``."""

import asyncio
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_console import AsJson, print_json, progress
from .cli_console import out as console
from .ir.errors import SkimpError

economics = typer.Typer(no_args_is_help=True, help="What serving costs, and where it is cheapest.")


@economics.command(
    epilog="Example:  skimp economics sweep --url http://127.0.0.1:8000/v1 --model m --hourly 0.79"
)
def sweep(
    url: Annotated[str | None, typer.Option(help="Of an OpenAI-compatible server.")] = None,
    model: Annotated[str, typer.Option(help="The name it knows the model by.")] = "default",
    key_env: Annotated[str | None, typer.Option(help="Environment variable with a key.")] = None,
    local: Annotated[
        str | None, typer.Option(help="Or a model in this process: 'smollm2' or a folder.")
    ] = None,
    tau: Annotated[float | None, typer.Option(help="Of a converted local model.")] = None,
    concurrency: Annotated[str, typer.Option(help="Levels.")] = "1,2,4,8",
    requests: Annotated[int, typer.Option(help="Per level, and at least the level.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Of a completion.")] = 64,
    hourly: Annotated[float | None, typer.Option(help="US dollars per hour, if rented.")] = None,
    price: Annotated[float, typer.Option(help="Purchase price, US dollars, if owned.")] = 2000,
    years: Annotated[float, typer.Option(help="Until it is written off.")] = 4,
    utilisation: Annotated[float, typer.Option(help="Share of the time that it works.")] = 0.5,
    kw: Annotated[float, typer.Option(help="Kilowatts at work.")] = 0.15,
    pue: Annotated[float, typer.Option(help="Power usage effectiveness.")] = 1.3,
    kwh: Annotated[float, typer.Option(help="US dollars per kilowatt-hour.")] = 0.12,
    maintenance: Annotated[float, typer.Option(help="Per year, share of the price.")] = 0.05,
    slo: Annotated[float, typer.Option(help="Most seconds to the first token.")] = math.inf,
    out: Annotated[Path, typer.Option("-o", "--out", help="JSON; .html beside it.")] = Path(
        "sweep.json"
    ),
    as_json: AsJson = False,
) -> None:
    """Load a server at rising concurrency; an interrupted sweep goes on where it was."""
    from .ir.cost import write_atomically
    from .runtime import economics as eco
    from .runtime.cascade.config import secret
    from .runtime.economics_report import write_page
    from .runtime.loadtest import sweep as run

    machine = None
    if hourly is None:
        machine = eco.Machine(price, years, utilisation, kw, pue, kwh, maintenance)
    rate = machine.hourly if machine is not None else float(hourly or 0)
    wanted = _levels(concurrency)
    member: Any
    if local is not None:
        from .runtime.cascade.local import LocalModel

        member = LocalModel.load(local, tau=tau)
    elif url is not None:
        from .runtime.cascade.endpoint import Endpoint

        key = secret(key_env, "--key-env") if key_env else None
        member = Endpoint(url, model, key=key)
    else:
        raise SkimpError("give --url or --local: what to load")
    source = {"model": local or model, "url": url, "tau": tau, "max_tokens": max_tokens}
    levels: list[eco.Level] = []
    if out.exists():
        before, levels = eco.read_sweep(out)
        if before["source"] != source:
            raise SkimpError(f"{out} is a sweep of something else ({before['source']}): give --out")
    left = [n for n in wanted if n not in {v.concurrency for v in levels}]
    bars, told = progress()

    def keep(level: eco.Level) -> None:
        levels.append(level)
        record = eco.sweep_record(source, levels, rate, machine)
        write_atomically(out, json.dumps(record, indent=1).encode())

    async def work() -> None:
        try:
            await run(
                member, left, requests=requests, max_tokens=max_tokens, progress=told, each=keep
            )
        finally:
            await member.close()

    if left:
        with bars:
            asyncio.run(work())
    record = eco.sweep_record(source, levels, rate, machine)
    rows = eco.curves(levels, rate)
    allowed = eco.zone(rows, slo=slo)
    record |= {"zone": allowed, "slo": slo if math.isfinite(slo) else None}
    write_atomically(out, json.dumps(record, indent=1).encode())
    page = write_page(out.with_suffix(".html"), sweeps=[record])
    if as_json:
        print_json(record)
        return
    _show_curves(rows, allowed)
    told_price = eco.measured_price(out)
    console.print(
        f"${rate:.4f} per hour; at its cheapest ${told_price.input:.4f} per million prompt tokens, "
        f"${told_price.output:.4f} per million completion tokens",
        highlight=False,
    )
    if machine is not None:
        ifs = ((u, eco.Machine(price, years, u, kw, pue, kwh, maintenance)) for u in (0.3, 0.9))
        told_rates = ", ".join(f"${m.hourly:.4f} at {u:g}" for u, m in ifs)
        console.print(f"by utilisation: {told_rates}", highlight=False)
    console.print(f"Report: {page}")


def _levels(text: str) -> list[int]:
    try:
        found = sorted({int(n) for n in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1 or found[-1] > 1024:
        raise SkimpError(f"--concurrency: {text!r} is not a list of numbers from 1 to 1024")
    return found


def _show_curves(rows: list[dict[str, Any]], allowed: list[int]) -> None:
    head = ("n", "req/s", "tokens/s", "first, s", "last, s", "$ / request", "marginal")
    table = Table(*head, "elasticity", "")
    for r in rows:
        (low, high), (least, most) = r["ttft_interval"], r["seconds_interval"]
        table.add_row(
            str(r["concurrency"]),
            f"{r['rate']:.2f}",
            f"{r['tokens_per_second']:.1f}",
            f"{r['ttft']:.3f} ({low:.3f}-{high:.3f})",
            f"{r['seconds']:.3f} ({least:.3f}-{most:.3f})",
            f"{r['average_cost']:.3g}",
            "" if r["marginal_cost"] is None else f"{r['marginal_cost']:.3g}",
            "" if r["elasticity"] is None else f"{r['elasticity']:.2f}",
            "zone" if r["concurrency"] in allowed else "",
        )
    console.print(table)


@economics.command(epilog="Example:  skimp economics frontier models.json -o frontier.html")
def frontier(
    points: Annotated[
        list[Path],
        typer.Argument(help="JSON lists of {name, cost, quality, latency (optional)}, or sweeps."),
    ],
    quality: Annotated[
        list[str] | None, typer.Option(help="Of a swept model, 'MODEL=0.8'; once for each.")
    ] = None,
    mix: Annotated[
        bool, typer.Option("--mix", help="Sweeps of different models, whatever their quality.")
    ] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="An HTML report.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what nothing else dominates in cost, quality and latency."""
    from .runtime import economics as eco
    from .runtime.economics_report import write_page

    rows = eco.read_points(points, _qualities(quality or []), mix=mix)
    latency = [r["latency"] for r in rows] if all("latency" in r for r in rows) else None
    kept = eco.frontier([r["cost"] for r in rows], [r.get("quality", 0.0) for r in rows], latency)
    found = [r | {"frontier": bool(k)} for r, k in zip(rows, kept, strict=True)]
    if out is not None:
        write_page(out, points=found)
    if as_json:
        print_json(found)
        return
    table = Table("model", "cost", "quality", "latency", "")
    for row in found:
        told = [f"{row[k]:.4g}" if k in row else "" for k in ("cost", "quality", "latency")]
        table.add_row(row["name"], *told, "frontier" if row["frontier"] else "")
    console.print(table)


def _qualities(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = math.nan
        if not name or not math.isfinite(found[name]):
            raise SkimpError(f"--quality: {text!r} is not MODEL=NUMBER")
    return found
