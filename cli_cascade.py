"""The commands around serving: ``skimp cascade`` and ``skimp serve``."""

import asyncio
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_console import INFEASIBLE, AsJson, ConfigFile, err, print_json, progress
from .cli_console import out as console
from .ir.errors import SkimpError

cascade = typer.Typer(no_args_is_help=True, help="Choose the cheapest model that will do.")


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
    tolerance: Annotated[
        float, typer.Option(help="Regret worth a lower mean cost; 0 as in the paper.")
    ] = 0.0,
    held_out: Annotated[float, typer.Option(help="Share kept for validation.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of draws and splits.")] = 0,
    ray: Annotated[
        str | None, typer.Option(help="Ray cluster whose workers try the policies: HOST:PORT.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose thresholds without labels, under a bound on what a query costs.

    Exits with 3, and writes nothing, where no policy keeps the bound.
    """
    from .runtime.cascade.calibrate import Goal, Infeasible
    from .runtime.cascade.calibrate import calibrate as run
    from .runtime.cascade.frontier import cost_frontier
    from .runtime.cascade.policy import policy_record, save_policy
    from .runtime.cascade.specs import specs_of
    from .runtime.cascade.traces import read_traces, tabulate
    from .runtime.cluster import on_ray

    rows = read_traces(traces)
    specs, default = specs_of(members, config, rows)
    extract = extractor or default
    table = tabulate(rows, specs, extract=extract, seed=seed)
    rest = (1 - held_out) / 2
    shares = (rest, rest, held_out)
    goal = Goal(budget, alpha, mode, delta, control, shares, seed, tolerance)  # type: ignore[arg-type]
    with nullcontext(map) if ray is None else on_ray(ray) as each:
        found = run(table, goal, each)
    for warning in table.warnings:
        err.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if isinstance(found, Infeasible):
        if as_json:
            print_json({"status": "infeasible"} | _fields(found))
        else:
            err.print(f"[yellow]infeasible:[/] {found.reason}", highlight=False)
            if found.least_budget is not None:
                err.print(f"the least feasible budget is ${found.least_budget:.6g} per query")
        raise typer.Exit(INFEASIBLE)
    record = policy_record(table, goal, found, extract, cost_frontier(table, goal))
    save_policy(record, out)
    if as_json:
        print_json({"status": "feasible", "file": str(out)} | record)
        return
    _show_policy(record, out)


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _show_policy(record: dict[str, Any], out: Path) -> None:
    table = Table("member", "samples", "believed from")
    tau = [*record["thresholds"], 0.0]
    for member, t in zip(record["members"], tau, strict=True):
        told = "never called" if t == "skip" else "always" if t == 0 else f"{t:.2f} agree"
        table.add_row(member["name"], str(member["samples"]), told)
    console.print(table)
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
        console.print(line, highlight=False)
    console.print(f"Policy: {out}  (sha256 {record['sha256'][:16]})", highlight=False)


@cascade.command(
    epilog="Example:  skimp cascade collect cascade.yaml --prompts questions.jsonl -o traces.jsonl"
)
def collect(
    config: Annotated[Path, typer.Argument(help="cascade.yaml.")],
    prompts: Annotated[Path, typer.Option(help="JSON lines with `prompt` or `messages`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Traces.")] = Path("traces.jsonl"),
    max_tokens: Annotated[
        int | None, typer.Option(help="Of a completion, instead of each member's own.")
    ] = None,
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
    bars, told = progress()

    async def work() -> int:
        try:
            return await run(
                read_prompts(prompts)[:limit],
                members,
                out,
                request={} if max_tokens is None else {"max_tokens": max_tokens},
                at_once=at_once,
                progress=told,
            )
        finally:
            for entry, _ in members:
                await entry.member.close()

    with bars:
        asked = asyncio.run(work())
    if as_json:
        print_json({"asked": asked, "file": str(out)})
    else:
        console.print(f"Asked {asked} prompts; traces: {out}")


@cascade.command(epilog="Example:  skimp cascade show policy.json")
def show(
    policy: Annotated[Path, typer.Argument(help="A policy file.")], as_json: AsJson = False
) -> None:
    """Show a policy file, if its hash fits."""
    from .runtime.cascade.policy import ROUTER, read_record

    record = read_record(policy)
    if as_json:
        print_json(record)
    elif record["format"] == ROUTER:
        raise SkimpError(f"{policy} is a router's: `skimp router show {policy}`")
    else:
        _show_policy(record, policy)


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
    ray: Annotated[
        str | None, typer.Option(help="Serve on a Ray cluster, and go on if it does: HOST:PORT.")
    ] = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="With --ray and no file: serve there no longer.")
    ] = False,
) -> None:
    """Serve a cascade to OpenAI clients, with a page at / and metrics at /metrics.

    With --ray the cluster serves, and this command ends. Call it again after a change: requests
    that are under way end as they began.
    """
    from .runtime.cascade.config import load_config

    if stop and (ray is None or config is not None or demo):
        raise SkimpError("--stop goes with --ray ADDRESS, and with nothing else")
    if not stop and (config is None) == (not demo):
        raise SkimpError("give a configuration file, or --demo")
    if ray is not None and demo:
        raise SkimpError("--demo serves in this process: give --ray a configuration file")
    try:
        from .runtime.cascade.build import build_gateway
        from .runtime.cascade.run import run
    except ImportError as error:
        raise SkimpError(f"serving needs `pip install 'skimp[serve]'` ({error.name})") from error
    if ray is not None:
        _serve_on_ray(ray, config, host, port, insecure=insecure)
        return
    if demo:
        from .runtime.cascade.demo import demo_gateway

        bars, told = progress()
        with bars:
            loaded, gateway = demo_gateway(told)
    else:
        assert config is not None
        loaded = load_config(config)
        gateway = build_gateway(loaded, config.parent)
    where, number = _address(loaded, host, port, insecure=insecure)
    err.print(f"skimp serves {', '.join(gateway.policies)} at http://{where}:{number}/")
    sys.exit(run(gateway, loaded, where, number))


def _address(config: Any, host: str | None, port: int | None, *, insecure: bool) -> tuple[str, int]:
    """Where to listen, if anyone who reaches it may."""
    from .runtime.cascade.config import ConfigError

    where = host or config.server.host
    if not config.callers and where not in ("127.0.0.1", "localhost", "::1") and not insecure:
        raise ConfigError(
            f"{where} can be reached from other machines, and no callers are configured: anyone "
            "could spend your money. Configure callers, or say --insecure"
        )
    return where, config.server.port if port is None else port


def _serve_on_ray(
    address: str, config: Path | None, host: str | None, port: int | None, *, insecure: bool
) -> None:
    """Deploy a configuration on a cluster, or take it away where there is none."""
    from .runtime.cascade.config import load_config
    from .runtime.cascade.on_ray import deploy, remove
    from .runtime.cluster import connected

    if config is None:
        with connected(address):
            remove()
        return
    loaded = load_config(config)
    where, number = _address(loaded, host, port, insecure=insecure)
    with connected(address):
        deploy(loaded, config.parent, where, number)
    err.print(f"the cluster at {address} serves {config} at http://{where}:{number}/")
