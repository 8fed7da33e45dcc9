"""What the commands share: two consoles, JSON on stdout, bars on stderr."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
ConfigFile = Annotated[Path | None, typer.Option(help="cascade.yaml, for members and prices.")]
INFEASIBLE = 3
"""Exit status where no policy keeps the bound."""


def print_json(value: Any) -> None:
    """One line on stdout."""
    print(json.dumps(value))  # noqa: T201


def progress() -> tuple[Progress, Callable[[str, float, float], None]]:
    """Bars on stderr; silent where that is not a terminal."""
    bars = Progress(
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def told(stage: str, done: float, total: float) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done)

    return bars, told
