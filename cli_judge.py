"""The command ``skimp judge``."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_console import AsJson, print_json, progress
from .cli_console import out as console
from .ir.errors import SkimpError


def judge(
    pairs: Annotated[
        Path,
        typer.Argument(help="JSON lines with `id`, `question`, `a`, `b`; `label` only to score."),
    ],
    config: Annotated[
        Path | None, typer.Option(help="cascade.yaml, where the judge is a member.")
    ] = None,
    member: Annotated[
        str | None, typer.Option("--judge", help="Its name there; the last one if left out.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="selective, full, or frozen: selective without learning.")
    ] = "selective",
    batch: Annotated[int, typer.Option(help="Pairs to an update of the guide.")] = 4,
    both: Annotated[
        bool, typer.Option("--both", help="Judge both orders again too, so consistency is known.")
    ] = False,
    anchors: Annotated[
        int, typer.Option(help="Pairs that an update must not get wrong, of those it was sure of.")
    ] = 0,
    guide: Annotated[
        Path | None, typer.Option(help="A log of another run, to start from its last guide.")
    ] = None,
    responses: Annotated[
        Path | None, typer.Option(help="A cache: nothing in it is asked again.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="Every version of the guide.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Verdicts, JSON lines.")] = Path(
        "verdicts.jsonl"
    ),
    max_tokens: Annotated[int, typer.Option(help="Of instructions and guides.")] = 1024,
    limit: Annotated[int | None, typer.Option(help="Only the first so many pairs.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order, on which learning depends.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare answers in pairs; the judge learns where its verdict depends on the order.

    Without --config the judge is SmolLM2 in this process, which is a weak one.
    """
    from dataclasses import asdict

    from .ir.cost import write_atomically
    from .runtime.cascade.judge import (
        Judge,
        MemberJudge,
        in_force,
        read_log,
        read_pairs,
        save_log,
        score,
    )
    from .runtime.cascade.judge_prompts import FIRST_GUIDE
    from .runtime.cascade.responses import ResponseCache

    asked, labels = read_pairs(pairs)
    asked = asked[:limit]
    start = FIRST_GUIDE
    if guide is not None:
        start = in_force(read_log(guide)).text
    entry = _entry(config, member)
    bars, told = progress()
    model = MemberJudge(entry, ResponseCache(responses), max_tokens)
    done = 0

    async def ask(stage: str, prompt: str) -> str:
        nonlocal done
        text = await model(stage, prompt)
        done += stage == "vanilla"
        told("judge", done, 2 * len(asked))
        return text

    async def work() -> Any:
        try:
            judge = Judge(
                ask,
                mode=mode,  # type: ignore[arg-type]
                batch=batch,
                seed=seed,
                both=both,
                anchors=anchors,
                guide=start,
            )
            return await judge.judge(asked)
        finally:
            await entry.member.close()

    with bars:
        judged = asyncio.run(work())
    lines = "".join(json.dumps(asdict(v)) + "\n" for v in judged.verdicts)
    write_atomically(out, lines.encode())
    if log is not None:
        save_log(judged, log)
    found = score(judged.verdicts, labels)
    found |= {"calls": dict(judged.calls), "cost": model.spent, "file": str(out)}
    found["versions"] = [v.status for v in judged.versions]
    if as_json:
        print_json(found)
    else:
        _show(found)


def _entry(config: Path | None, member: str | None) -> Any:
    try:
        from .runtime.cascade.build import build_entry
        from .runtime.cascade.config import load_config, parse_config
    except ImportError as error:
        raise SkimpError(f"judging needs `pip install 'skimp[serve]'` ({error.name})") from error
    if config is None:
        free = {"local": "smollm2", "price": {"input": 0, "output": 0}}
        loaded, folder = parse_config({"members": {"smollm2": free}}), Path()
    else:
        loaded, folder = load_config(config), config.parent
    name = member or list(loaded.members)[-1]
    if name not in loaded.members:
        raise SkimpError(f"no member {name!r}; there are {', '.join(loaded.members)}")
    return build_entry(name, loaded.members[name], folder)


def _share(x: float | None) -> str:
    return "not known" if x is None else f"{x:.3f}"


def _show(found: dict[str, Any]) -> None:
    table = Table("", "plain, both orders", "after learning", "a coin instead")
    table.add_row("consistent", _share(found["plain_consistency"]), _share(found["consistency"]))
    if "acc" in found:
        null = found["null"]
        coin = f"{null['acc']:.3f} ({null['low']:.3f} to {null['high']:.3f})"
        table.add_row("right", _share(found.get("plain_acc")), _share(found["acc"]), coin)
        table.add_row("right in both orders", "", _share(found["pair_acc"]))
    console.print(table)
    calls = ", ".join(f"{k} {v}" for k, v in found["calls"].items())
    again = f"{found['pairs']} pairs, {found['again']} judged again ({found['rho']:.1%})"
    cost = f"${found['cost']:.6f}; guide: {', '.join(found['versions'])}"
    console.print(f"{again}; calls: {calls}; {cost}", highlight=False)
    console.print(f"Verdicts: {found['file']}", highlight=False)
