"""The commands around serving: ``skimp cascade``, ``skimp economics`` and ``skimp serve``."""

import asyncio
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .ir.errors import SkimpError

cascade = typer.Typer(no_args_is_help=True, help="Choose the cheapest model that will do.")
economics = typer.Typer(no_args_is_help=True, help="What serving costs, and where it is cheapest.")
_out = Console()
_err = Console(stderr=True)
INFEASIBLE = 3
"""Exit status where no policy keeps the bound."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
ConfigFile = Annotated[Path | None, typer.Option(help="cascade.yaml, for members and prices.")]


def _print_json(value: Any) -> None:
    print(json.dumps(value))  # noqa: T201


def _progress() -> tuple[Progress, Callable[[str, float, float], None]]:
    """Bars on stderr; silent where that is not a terminal."""
    bars = Progress(
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_err,
        disable=not _err.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def told(stage: str, done: float, total: float) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done)

    return bars, told


# -- cascade --------------------------------------------------------------------------------------


@cascade.command(
    epilog="Example:  skimp cascade calibrate --traces t.jsonl --alpha 0.1 --budget 0.003 -o p.json"
)
def calibrate(
    traces: Annotated[Path, typer.Option(help="Samples of every member, JSON lines.")],
    budget: Annotated[float, typer.Option(help="US dollars that a query may cost.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The policy file.")] = Path(
        "policy.json"
    ),
    alpha: Annotated[float, typer.Option(help="Share of queries that may cost more.")] = 0.1,
    mode: Annotated[
        str, typer.Option(help="'paper': on average. 'strict': for the policy chosen.")
    ] = "paper",
    delta: Annotated[
        float, typer.Option(help="Of 'strict': share of calibrations that may be wrong.")
    ] = 0.1,
    control: Annotated[
        str, typer.Option(help="Of 'strict': 'fixed-sequence' or 'holm'.")
    ] = "fixed-sequence",
    members: Annotated[
        str | None,
        typer.Option(help="In order of escalation, with samples: 'small:5,large:1'."),
    ] = None,
    config: ConfigFile = None,
    extractor: Annotated[
        str | None, typer.Option(help="number, choice, boxed, code, json:FIELD or regex:PATTERN.")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share kept for validation.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of draws and splits.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Choose thresholds without labels, under a bound on what a query costs.

    Exits with 3, and writes nothing, where no policy keeps the bound.
    """
    from .runtime.cascade.calibrate import Goal, Infeasible
    from .runtime.cascade.calibrate import calibrate as run
    from .runtime.cascade.frontier import cost_frontier
    from .runtime.cascade.policy import policy_record, save_policy
    from .runtime.cascade.traces import read_traces, tabulate

    rows = read_traces(traces)
    specs, default = _specs(members, config, rows)
    extract = extractor or default
    table = tabulate(rows, specs, extract=extract, seed=seed)
    rest = (1 - held_out) / 2
    goal = Goal(budget, alpha, mode, delta, control, (rest, rest, held_out), seed)  # type: ignore[arg-type]
    found = run(table, goal)
    for warning in table.warnings:
        _err.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if isinstance(found, Infeasible):
        if as_json:
            _print_json({"status": "infeasible"} | _fields(found))
        else:
            _err.print(f"[yellow]infeasible:[/] {found.reason}", highlight=False)
            if found.least_budget is not None:
                _err.print(f"the least feasible budget is ${found.least_budget:.6g} per query")
        raise typer.Exit(INFEASIBLE)
    record = policy_record(table, goal, found, extract, cost_frontier(table, goal))
    save_policy(record, out)
    if as_json:
        _print_json({"status": "feasible", "file": str(out)} | record)
        return
    _show_policy(record, out)


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _specs(members: str | None, config: Path | None, rows: list[dict[str, Any]]) -> Any:
    """Members and samples: as told, as configured, or as the traces have them."""
    from .runtime.cascade.config import load_config, price_of
    from .runtime.cascade.traces import MemberSpec

    prices, samples, extract = {}, {}, "number"
    if config is not None:
        loaded = load_config(config)
        prices = {n: price_of(m, config.parent) for n, m in loaded.members.items()}
        samples = {n: m.samples for n, m in loaded.members.items()}
        extract = loaded.extractor
    if members is not None:
        samples = {}
        for part in members.split(","):
            name, _, count = part.strip().rpartition(":")
            if not name or not count.isdigit() or int(count) < 1:
                raise SkimpError(f"--members: {part!r} is not NAME:SAMPLES")
            samples[name] = int(count)
    if not samples:
        for name in rows[0]["members"]:
            found = [r["members"].get(name, {}).get("samples", []) for r in rows]
            samples[name] = max(1, min(len(s) for s in found))
    return [MemberSpec(n, k, prices.get(n)) for n, k in samples.items()], extract


def _show_policy(record: dict[str, Any], out: Path) -> None:
    table = Table("member", "samples", "believed from")
    tau = [*record["thresholds"], 0.0]
    for member, t in zip(record["members"], tau, strict=True):
        told = "never called" if t == "skip" else "always" if t == 0 else f"{t:.2f} agree"
        table.add_row(member["name"], str(member["samples"]), told)
    _out.print(table)
    held, evidence = record["held_out"], record["evidence"]
    lines = [
        f"P(cost > ${record['budget']:g}) <= {record['alpha']:g}, {record['mode']} mode; "
        f"regret {evidence['regret']:.3f} on the queries it was chosen on",
        f"true regret is at most {record['bounds']['regret_pac_bayes']:.3f} (PAC-Bayes, 95 %): a "
        "bound, not an estimate",
    ]
    if record["mode"] == "paper":
        lines.append(
            "the cost bound is an average over calibrations: this one vouches for "
            f"{record['exceedance_ceiling']:.3f} at {1 - record['delta']:.0%}"
        )
    if held["queries"]:
        low, high = held["exceedance_interval"]
        lines.append(
            f"held out, {held['queries']} queries: {held['exceedance']:.3f} exceed "
            f"({low:.3f} to {high:.3f}), regret {held['regret']:.3f}, mean cost "
            f"${held['mean_cost']:.6f} against ${held['mean_cost_of_strongest']:.6f} for the last"
        )
    for line in lines:
        _out.print(line, highlight=False)
    _out.print(f"Policy: {out}  (sha256 {record['sha256'][:16]})", highlight=False)


@cascade.command(
    epilog="Example:  skimp cascade collect cascade.yaml --prompts questions.jsonl -o traces.jsonl"
)
def collect(
    config: Annotated[Path, typer.Argument(help="cascade.yaml.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines with `prompt` or `messages`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Traces.")] = Path("traces.jsonl"),
    max_tokens: Annotated[int, typer.Option(help="Of a completion.")] = 512,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    at_once: Annotated[int, typer.Option(help="Prompts under way.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Ask every member for its samples; start again after an interruption and it goes on."""
    from .runtime.cascade.build import build_entry
    from .runtime.cascade.collect import collect as run
    from .runtime.cascade.collect import read_prompts
    from .runtime.cascade.config import load_config
    from .runtime.cascade.traces import MemberSpec

    loaded = load_config(config)
    members = [
        (build_entry(n, m, config.parent), MemberSpec(n, m.samples))
        for n, m in loaded.members.items()
    ]
    bars, told = _progress()

    async def work() -> int:
        try:
            return await run(
                read_prompts(prompts)[:limit],
                members,
                out,
                request={"max_tokens": max_tokens},
                at_once=at_once,
                progress=told,
            )
        finally:
            for entry, _ in members:
                await entry.member.close()

    with bars:
        asked = asyncio.run(work())
    if as_json:
        _print_json({"asked": asked, "file": str(out)})
    else:
        _out.print(f"Asked {asked} prompts; traces: {out}")


@cascade.command(epilog="Example:  skimp cascade show policy.json")
def show(
    policy: Annotated[Path, typer.Argument(help="A policy file.")], as_json: AsJson = False
) -> None:
    """Show a policy file, if its hash fits."""
    from .runtime.cascade.policy import load_policy

    record = dict(load_policy(policy).record)
    if as_json:
        _print_json(record)
    else:
        _show_policy(record, policy)


# -- economics ------------------------------------------------------------------------------------


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

        member, name = LocalModel.load(local, tau=tau), local
    elif url is not None:
        from .runtime.cascade.endpoint import Endpoint

        key = secret(key_env, "--key-env") if key_env else None
        member, name = Endpoint(url, model, key=key), model
    else:
        raise SkimpError("give --url or --local: what to load")
    levels = eco.read_sweep(out)[1] if out.exists() else []
    left = [n for n in wanted if n not in {v.concurrency for v in levels}]
    bars, told = _progress()

    def keep(level: eco.Level) -> None:
        levels.append(level)
        record = eco.sweep_record(name, levels, rate, machine)
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
    record = eco.sweep_record(name, levels, rate, machine)
    rows = eco.curves(levels, rate)
    allowed = eco.zone(rows, slo=slo)
    record |= {"zone": allowed, "slo": slo if math.isfinite(slo) else None}
    write_atomically(out, json.dumps(record, indent=1).encode())
    page = write_page(out.with_suffix(".html"), sweeps=[record])
    if as_json:
        _print_json(record)
        return
    _show_curves(rows, allowed)
    told_price = eco.measured_price(out)
    _out.print(
        f"${rate:.4f} per hour; at its cheapest ${told_price.input:.4f} per million prompt tokens, "
        f"${told_price.output:.4f} per million completion tokens",
        highlight=False,
    )
    if machine is not None:
        ifs = ((u, eco.Machine(price, years, u, kw, pue, kwh, maintenance)) for u in (0.3, 0.9))
        told_rates = ", ".join(f"${m.hourly:.4f} at {u:g}" for u, m in ifs)
        _out.print(f"by utilisation: {told_rates}", highlight=False)
    _out.print(f"Report: {page}")


def _levels(text: str) -> list[int]:
    try:
        found = sorted({int(n) for n in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1 or found[-1] > 1024:
        raise SkimpError(f"--concurrency: {text!r} is not a list of numbers from 1 to 1024")
    return found


def _show_curves(rows: list[dict[str, Any]], allowed: list[int]) -> None:
    table = Table("n", "req/s", "tokens/s", "TTFT, s", "$ / request", "marginal", "elasticity", "")
    for r in rows:
        low, high = r["ttft_interval"]
        table.add_row(
            str(r["concurrency"]),
            f"{r['rate']:.2f}",
            f"{r['tokens_per_second']:.1f}",
            f"{r['ttft']:.3f} ({low:.3f}-{high:.3f})",
            f"{r['average_cost']:.3g}",
            "" if r["marginal_cost"] is None else f"{r['marginal_cost']:.3g}",
            "" if r["elasticity"] is None else f"{r['elasticity']:.2f}",
            "zone" if r["concurrency"] in allowed else "",
        )
    _out.print(table)


@economics.command(epilog="Example:  skimp economics frontier models.json -o frontier.html")
def frontier(
    points: Annotated[
        Path, typer.Argument(help="JSON list of {name, cost, quality, latency (optional)}.")
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="An HTML report.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which models no other dominates in cost, quality and latency."""
    from .runtime import economics as eco
    from .runtime.economics_report import write_page

    try:
        rows = json.loads(points.read_text())
        cost = [float(r["cost"]) for r in rows]
        quality = [float(r["quality"]) for r in rows]
        latency = [float(r["latency"]) for r in rows] if all("latency" in r for r in rows) else None
        names = [str(r["name"]) for r in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SkimpError(f"{points} is no list of name, cost and quality: {error!r}") from error
    if not rows:
        raise SkimpError(f"{points} holds no points")
    kept = eco.frontier(cost, quality, latency)
    found = [r | {"frontier": bool(k)} for r, k in zip(rows, kept, strict=True)]
    if out is not None:
        write_page(out, points=found)
    if as_json:
        _print_json(found)
        return
    table = Table("model", "cost", "quality", "latency", "")
    for i, name in enumerate(names):
        told = "" if latency is None else f"{latency[i]:g}"
        mark = "frontier" if kept[i] else ""
        table.add_row(name, f"{cost[i]:.4g}", f"{quality[i]:.4g}", told, mark)
    _out.print(table)


# -- serve ----------------------------------------------------------------------------------------


def serve(
    config: Annotated[Path | None, typer.Argument(help="cascade.yaml.")] = None,
    host: Annotated[str | None, typer.Option(help="Instead of the configured one.")] = None,
    port: Annotated[int | None, typer.Option(help="Instead of the configured one.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="A cascade of two local models; needs no file.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option(help="Listen beyond this machine though nobody needs a key.")
    ] = False,
) -> None:
    """Serve a cascade to OpenAI clients, with a page at / and metrics at /metrics."""
    from .runtime.cascade.config import ConfigError, load_config

    if (config is None) == (not demo):
        raise SkimpError("give a configuration file, or --demo")
    try:
        from .runtime.cascade.build import build_gateway
        from .runtime.cascade.run import run
    except ImportError as error:
        raise SkimpError(f"serving needs `pip install 'skimp[serve]'` ({error.name})") from error
    if demo:
        from .runtime.cascade.demo import demo_gateway

        bars, told = _progress()
        with bars:
            loaded, gateway = demo_gateway(told)
    else:
        assert config is not None
        loaded = load_config(config)
        gateway = build_gateway(loaded, config.parent)
    where = host or loaded.server.host
    if not loaded.callers and where not in ("127.0.0.1", "localhost", "::1") and not insecure:
        raise ConfigError(
            f"{where} can be reached from other machines, and no callers are configured: anyone "
            "could spend your money. Configure callers, or say --insecure"
        )
    number = loaded.server.port if port is None else port
    _err.print(f"skimp serves {', '.join(gateway.policies)} at http://{where}:{number}/")
    sys.exit(run(gateway, loaded, where, number))
