"""The commands around planning: ``skimp router``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_console import INFEASIBLE, AsJson, ConfigFile, err, print_json, progress
from .cli_console import out as console
from .ir.errors import SkimpError

router = typer.Typer(no_args_is_help=True, help="Plan which members answer, one after another.")


@router.command(
    epilog="Examples:  skimp router train --prompts q.jsonl --traces t.jsonl -o router.json ;  "
    "skimp router train --prompts q.jsonl --replay responses.jsonl --config cascade.yaml --hops 2"
)
def train(
    prompts: Annotated[
        Path, typer.Option(help="JSON lines with `id`, `prompt` or `messages`, and `answer`.")
    ],
    traces: Annotated[
        Path | None, typer.Option(help="What members said to the bare prompts, recorded.")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="A cache of responses; with --config, what it lacks is asked and added."),
    ] = None,
    config: ConfigFile = None,
    members: Annotated[
        str | None, typer.Option(help="With samples: 'small:5,large:1'. The last is the strongest.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The policy file.")] = Path(
        "router.json"
    ),
    hops: Annotated[int, typer.Option(help="Members that run, one after another.")] = 1,
    stop: Annotated[
        bool, typer.Option("--stop", help="May serve before all hops are taken.")
    ] = False,
    lam: Annotated[
        float, typer.Option(help="What the dearest call costs, in units of quality.")
    ] = 0.1,
    cap: Annotated[
        float | None, typer.Option(help="US dollars beyond which an answer is worth nothing.")
    ] = None,
    quality: Annotated[
        str, typer.Option(help="gold, score, or agreement (with the last member: no labels).")
    ] = "gold",
    budget: Annotated[
        float | None, typer.Option(help="US dollars that a query may cost; checked, not sought.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Share of queries that may cost more.")] = 0.1,
    embed: Annotated[
        str, typer.Option(help="auto, minilm, tfidf, or the folder of a converted encoder.")
    ] = "auto",
    extractor: Annotated[
        str | None, typer.Option(help="number, choice, boxed, code, json:FIELD or regex:PATTERN.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Hops to play.")] = 20_000,
    absent: Annotated[
        float, typer.Option(help="Train for pools in which a member is missing this often.")
    ] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    seed: Annotated[int, typer.Option(help="Of split, draws and training.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a router with PPO, and compare it with what is simpler.

    Exits with 3, and writes nothing, where its cost does not keep the budget.
    """
    import math

    from .runtime.cascade.router import Plan, save_router
    from .runtime.cascade.router_train import Bound, Training, build
    from .runtime.cascade.router_world import World, read_questions, recorded
    from .runtime.cascade.specs import specs_of
    from .runtime.cascade.traces import read_traces

    if (traces is None) == (replay is None):
        raise SkimpError("give --traces, or --replay")
    questions = read_questions(prompts)[:limit]
    close = None
    if traces is not None:
        rows = read_traces(traces)
        specs, default = specs_of(members, config, rows)
        source: Any = recorded(rows, questions, specs, extract=extractor or default, seed=seed)
    else:
        assert replay is not None
        source, specs, default = _replay(replay, config, members)
        close = source.close
    cost_cap = math.inf if cap is None else cap
    plan = Plan(hops, lam, 1.0, 1.0, cost_cap, stop, "append" if traces is None else "question")
    world = World(
        questions,
        specs,
        source,
        extract=extractor or default,
        quality=quality,
        context=plan.context,
    )
    bars, told = progress()
    bound = Bound(math.inf if budget is None else budget, alpha)
    how = Training(steps=steps, absent=absent, seed=seed)
    try:
        with bars:
            policy, record = build(world, plan, bound, how, embed=embed, progress=told)
    finally:
        if close is not None:
            close()
    if not record.pop("feasible"):
        least = record["least_budget"]
        if as_json:
            print_json({"status": "infeasible", "least_budget": least})
        else:
            told_least = "none with so few queries" if least is None else f"${least:.6g}"
            err.print(f"[yellow]infeasible:[/] the least budget that holds is {told_least}")
        raise typer.Exit(INFEASIBLE)
    record = save_router(policy, record, out)
    if as_json:
        print_json({"status": "feasible", "file": str(out)} | record)
    else:
        _show(record, out)


def _replay(path: Path, config: Path | None, members: str | None) -> Any:
    from .runtime.cascade.responses import Replay, ResponseCache
    from .runtime.cascade.specs import specs_of

    if config is None and not path.exists():
        raise SkimpError(f"{path} does not exist, and without --config there is nobody to ask")
    cache = ResponseCache(path)
    if config is None:
        told = members or ",".join(f"{m}:{n}" for m, n in cache.models.items())
        specs, extract = specs_of(told, None, [])
        return Replay(cache, specs), specs, extract
    from .runtime.cascade.build import build_entry
    from .runtime.cascade.config import load_config

    loaded = load_config(config)
    specs, extract = specs_of(members, config, [])
    entries = {
        s.name: build_entry(s.name, loaded.members[s.name], config.parent)
        for s in specs
        if s.name in loaded.members
    }
    return Replay(cache, specs, entries), specs, extract


@router.command(epilog="Example:  skimp router show router.json")
def show(
    policy: Annotated[Path, typer.Argument(help="A router's policy file.")],
    as_json: AsJson = False,
) -> None:
    """Show a router, if its hash fits, and what it was compared with."""
    from .runtime.cascade.policy import ROUTER, read_record

    record = read_record(policy)
    if record["format"] != ROUTER:
        raise SkimpError(f"{policy} is a cascade's: `skimp cascade show {policy}`")
    if as_json:
        print_json(record)
    else:
        _show(record, policy)


def _show(record: dict[str, Any], path: Path) -> None:
    against = record["against"]
    table = Table("on held-out queries", "quality", "cost", "return", "router is")
    names = ("router", "best-single", "best-sequence", "thresholds", "knn", "random", "oracle")
    for name in names:
        if (row := against.get(name)) is None:
            continue
        who = ">".join(row["members"]) if "members" in row else ""
        table.add_row(
            f"{name} {who}".strip(),
            f"{row['quality']['mean']:.3f}",
            f"${row['cost']['mean']:.6f}",
            f"{row['value']['mean']:.3f} ({row['value']['low']:.3f} to {row['value']['high']:.3f})",
            record["verdicts"].get(name, ""),
        )
    console.print(table)
    routes = ", ".join(f"{k} {v}" for k, v in list(record["routes"].items())[:8])
    split = record["split"]
    lines = [
        f"queries: {split['sizes'][0]} to train, {split['sizes'][1]} to bound, {split['sizes'][2]} "
        f"to judge; {split['repeated']} repeated left out, {split['leaks']} judged that are as "
        "good as trained on",
        f"routes: {routes}",
        "the reward is a reconstruction: -lam * cost / scale per hop, + quality when served",
    ]
    if "budget" in record:
        lines.append(
            f"P(cost > ${record['budget']:g}) <= {record['alpha']:g} on average over calibrations; "
            f"this one vouches for {record['exceedance_ceiling']:.3f} at 90%"
        )
    if record["verdicts"]["best-single"] != "better":
        alone = against["best-single"]["members"][0]
        lines.append(
            f"not shown to be better than {alone!r} alone, and `single:{alone}` is simpler to serve"
        )
    for line in lines:
        console.print(line, highlight=False)
    console.print(f"Policy: {path}  (sha256 {record['sha256'][:16]})", highlight=False)
