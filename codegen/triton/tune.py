"""Opt-in tuning: time the plans and tiles of a call and use the fastest from then on."""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import tuned
from .launch import family, run
from .spec import FEW_ROWS, Family, Tiles, TritonSpec, candidates, shape_class


def plans(spec: TritonSpec, rows: int) -> list[str]:
    """The plans that can serve so many rows."""
    found = ["few", "masked"] if rows <= FEW_ROWS else ["masked", "lists", "pairs", "blocks"]
    return [plan for plan in found if plan in ("few", "masked") or not spec.scored]


def options(spec: TritonSpec, rows: int, family: Family = "hopper") -> Iterator[tuple[str, Tiles]]:
    """Every plan with each of its candidate tiles."""
    for plan in plans(spec, rows):
        for tiles in candidates(spec, plan, rows, family):
            yield plan, tiles


def tune(
    spec: TritonSpec, *args: Tensor | None, write: bool = True, milliseconds: int = 30
) -> list[tuple[float, str, Tiles]]:
    """Time every option on the given arguments and remember the fastest for their class.

    Every call makes and clears its own sums and counters, so nothing that an option leaves behind
    reaches the next one or the first call after tuning.

    Args:
        spec: Of the block.
        args: As :func:`skimp.codegen.triton.launch.run` takes them, from ``x`` to ``b_out``, with
            scores that select as many experts as real ones do.
        write: Keep what is found for later processes.
        milliseconds: To spend on each option, after compiling it.

    Returns:
        ``(milliseconds, plan, tiles)``, fastest first; options that do not fit the device's
        registers or shared memory are left out.
    """
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    x = args[0]
    assert x is not None
    rows = x.numel() // spec.d
    timed = []
    for plan, tiles in options(spec, rows, family(x.device)):
        try:
            took = do_bench(
                lambda plan=plan, tiles=tiles: run(spec, plan, *args, tiles=tiles),  # type: ignore[misc, arg-type]
                warmup=milliseconds // 3, rep=milliseconds, return_mode="median",
            )  # fmt: skip
        except (OutOfResources, PTXASError, CompilationError):
            continue
        timed.append((float(took), plan, tiles))
    timed.sort(key=lambda t: t[0])
    _, plan, tiles = timed[0]
    tuned.remember(spec, shape_class(rows), x.device, plan, tiles, write=write)
    torch.cuda.synchronize(x.device)
    return timed
