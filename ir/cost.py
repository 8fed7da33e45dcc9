"""What a block costs: symbolic FLOPs and bytes, and measured time where it was profiled.

A multiply-add counts as two FLOPs, activations as none, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .block import DynkFFN, Projection

if TYPE_CHECKING:
    import sympy


@cache
def symbols() -> dict[str, sympy.Symbol]:
    """The symbols of the expressions."""
    import sympy

    names = "rows d d_ff d_out experts k width itemsize gates linear"
    return {name: sympy.Symbol(name, positive=True) for name in names.split()}


@cache
def expressions() -> dict[str, sympy.Expr]:
    """FLOPs and bytes per call, by name.

    ``gates`` is 1 for a gated network, else 0; ``k`` is the mean number of experts per row.
    ``dense_flops`` is what the block replaced: a network like itself, or, where ``linear`` is 1,
    one linear layer. ``bytes`` counts weights read once per call, if every row needs the same
    ``k`` experts, which is the least that a call of few rows can read.
    """
    s = symbols()
    neuron = s["d"] * (1 + s["gates"]) + s["d_out"]
    network = 2 * s["rows"] * s["d_ff"] * neuron
    linear = 2 * s["rows"] * s["d"] * s["d_out"]
    router = 2 * s["rows"] * s["width"] * (s["d"] + s["experts"])
    share = s["k"] / s["experts"]
    router_bytes = s["width"] * (s["d"] + s["experts"])
    return {
        "dense_flops": s["linear"] * linear + (1 - s["linear"]) * network,
        "router_flops": router,
        "flops": router + share * network,
        "bytes": s["itemsize"] * (router_bytes + share * s["d_ff"] * neuron),
    }


def evaluate(name: str, block: DynkFFN, *, rows: float = 1, k: float | None = None) -> float:
    """Put a block's sizes into an expression of :func:`expressions`.

    Args:
        name: ``dense_flops``, ``router_flops``, ``flops`` or ``bytes``.
        block: The block.
        rows: Rows per call.
        k: Mean experts per row; by default all.
    """
    values = dict(
        rows=rows,
        d=block.d,
        d_ff=block.d_ff,
        d_out=block.d_out,
        experts=block.experts,
        k=block.experts if k is None else k,
        width=block.router.down.out_features,
        itemsize=block.w_in.element_size(),
        gates=int(block.gated),
        linear=int(block.linear),
    )
    return float(expressions()[name].subs({symbols()[n]: v for n, v in values.items()}))


def dense_flops(place: DynkFFN | Projection) -> float:
    """FLOPs per row of what was there before any conversion."""
    if isinstance(place, Projection):
        return 2.0 * place.d * place.d_out
    return evaluate("dense_flops", place)


def spent_flops(place: DynkFFN | Projection, k: float | None = None) -> float:
    """FLOPs per row of what is there now, the router included, at ``k`` experts per row."""
    if isinstance(place, Projection) or place.dense:
        return dense_flops(place)
    return evaluate("flops", place, k=k)


def ffn_share(chosen: Mapping[str, float], places: Mapping[str, DynkFFN | Projection]) -> float:
    """FLOPs of the blocks, routers included, as a share of what they replace.

    Args:
        chosen: Mean experts per row, k, by block name.
        places: Blocks, and linear layers that could have been, by name. What stays dense counts as
            dense.
    """
    dense = sum(dense_flops(p) for p in places.values())
    return sum(spent_flops(p, chosen.get(name)) for name, p in places.items()) / dense


def cache_dir() -> Path:
    """``$SKIMP_CACHE``, or ``skimp`` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SKIMP_CACHE") or Path(base) / "skimp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@dataclass(slots=True)
class Curves:
    """Seconds per call, measured on this machine: one file per device and number of threads.

    Attributes:
        path: Where they are stored.
        seconds: By key, see :meth:`key`.
    """

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, device: str = "cpu") -> Curves:
        """Read the curves of a device at the current number of threads; empty if there are none."""
        name = f"curves-{device}-{_machine()}-{torch.get_num_threads()}t.json"
        path = cache_dir() / name
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {}
        return cls(path, {str(k): float(v) for k, v in found.items()})

    @staticmethod
    def key(block: DynkFFN, rows: int, share: float | None) -> str:
        """Name of a measurement; ``share`` is the active share, ``None`` the dense network."""
        what = "dense" if share is None else f"share={round(share, 1)}"
        kind = "gated-" if block.gated else ""
        return (
            f"{kind}{block.act}-{block.d}x{block.d_ff}x{block.d_out}-e{block.expert_size}-"
            f"{str(block.w_in.dtype).removeprefix('torch.')}-rows={rows}-{what}"
        )

    def store(self) -> None:
        """Write the curves; a cache that cannot be written is not worth an error."""
        try:
            write_atomically(self.path, json.dumps(self.seconds, indent=1).encode())
        except OSError:
            return


@cache
def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        model = "unknown"
    return "".join(c if c.isalnum() else "-" for c in model)[:40]
