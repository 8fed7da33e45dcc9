"""What a GPU kernel is generated for, which kernels a call takes, and the sizes of their tiles."""

from dataclasses import dataclass, replace
from typing import Literal

from ...ir.op import SCORED
from ..spec import BlockSpec

FEW_ROWS = 16
SPAN = 4096
MANY = 1 << 16
"""Rows for which tiles are chosen where the number is not known."""
Family = Literal["ampere", "hopper", "cdna"]
"""What tiles depend on: with whole warp groups (sm_90 and later) or without, and AMD's."""
PRECISIONS = ("ieee", "tf32", "tf32x3")
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TritonSpec(BlockSpec):
    """Everything that is constant in the text of a kernel.

    Attributes:
        precision: Of float32 products: ``ieee``, ``tf32`` or ``tf32x3``. Else without effect.
    """

    precision: str = "ieee"

    @property
    def experts(self) -> int:
        """Number of experts, E."""
        return self.d_ff // self.expert_size

    @property
    def scored(self) -> bool:
        """Whether scores weight experts, and tau is compared with their magnitude."""
        return self.act == SCORED


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel divides its work.

    Attributes:
        rows: Rows of a tile.
        neurons: Hidden neurons of a tile.
        depth: Of the first product's inner loop.
        columns: Of the second product's tile.
        warps: Per program.
        stages: Of the software pipeline.
    """

    rows: int
    neurons: int
    depth: int
    columns: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return dict(BM=self.rows, BH=self.neurons, BK=self.depth, BO=self.columns)


def padded(n: int, least: int = 16) -> int:
    """The next power of two, as the widths of Triton's tiles must be."""
    return max(least, 1 << (n - 1).bit_length())


def selection_rows(spec: TritonSpec, plan: str) -> int:
    """Rows that one program of ``thresholds`` (no lists) or ``route`` (lists) looks at."""
    if plan in ("blocks", "masked"):
        return min(64, max(1, 4096 // padded(spec.experts, 1)))
    return min(64, max(8, 4096 // padded(spec.experts, 1)))


def choose(spec: TritonSpec, rows: int, *, deterministic: bool = False) -> str:
    """Which kernels serve so many rows. What is said of speed was measured on an H100.

    Args:
        spec: Of the block.
        rows: How many.
        deterministic: Never add in an order that changes from run to run.

    Returns:
        ``few``: each program streams the weights of a few neurons that some row needs.
        ``lists``: the first product runs over lists of the rows of each expert, the second is
        dense: its sum over experts then stays in registers, which on tensor cores costs less than
        ``pairs``, where both run over lists, the hidden tile stays on chip, and sums are atomic.
        Where products are slow (``tf32x3``), ``pairs`` is the faster.
        ``masked``: dense products, the activations of resting experts set to zero between them;
        for experts too small for a tile, which on tensor cores save nothing.
        ``blocks``: like ``masked``, but in one kernel that leaves out blocks of rows and neurons
        that no row needs; for routing that is alike in neighbouring rows, so never the default.
    """
    if rows <= FEW_ROWS and not deterministic:
        return "few"
    # A list of rows pays where it fills tiles, and an expert where it fills a tensor core.
    if spec.scored or spec.expert_size < 64 or rows * spec.experts < 1 << 15:
        return "masked"
    if spec.dtype != "float32":
        return "lists"
    # PyTorch's IEEE and TF32 products outrun Triton's by more than skipping saves; Triton's split
    # one outruns IEEE, and the second product must then be Triton's too
    return "pairs" if spec.precision == "tf32x3" and not deterministic else "masked"


def shape_class(rows: int) -> str:
    """A key for tuned tiles: calls of one class share what is best for them."""
    if rows <= FEW_ROWS:
        return "1" if rows == 1 else str(FEW_ROWS)
    return str(min(padded(rows, 64), 65536))


def default_tiles(spec: TritonSpec, plan: str, rows: int, family: Family = "hopper") -> Tiles:
    """Tiles that do well untuned. Only those of bfloat16 on an H100 were measured."""
    tiles = _untuned(spec, plan, rows, family)
    return replace(tiles, stages=min(tiles.stages, 2)) if family == "cdna" else tiles


def _untuned(spec: TritonSpec, plan: str, rows: int, family: Family) -> Tiles:
    wide, hopper = spec.dtype == "float32", family == "hopper"
    split = spec.precision == "tf32x3"  # an operand of its products is two numbers
    if plan == "few":
        if rows == 1:
            return Tiles(1, 8 if spec.d < 1024 else 4, min(padded(spec.d), 1024), 1024, 4, 1)
        if wide:
            return Tiles(16, 16, 64 if split else 128, 64, 4, 2)
        return Tiles(16, 32, 128, 128, 4, 3) if spec.d_ff < 6144 else Tiles(16, 64, 128, 128, 8, 3)
    if plan == "masked":
        return Tiles(32, 128, 16, 16, 4, 1)
    if not wide:
        # two sums of a gated tile leave registers for half the neurons
        half = spec.gated and (plan != "lists" or not hopper)
        columns = 128 if hopper or plan != "pairs" else 64
        tiles = Tiles(128, 64 if half else 128, 64, columns, 8, 3)
    elif plan != "pairs":
        tiles = Tiles(64, 64, 32 if hopper or not split else 16, 64, 8, 2)
    elif spec.precision == "ieee":
        tiles = Tiles(64, 32, 32, 64, 4 if hopper or not spec.gated else 8, 2)
    else:
        tiles = Tiles(128, 64 if hopper and not spec.gated else 32, 32, 64, 8, 3)
    neurons = spec.expert_size if plan in ("pairs", "lists") else spec.d_ff
    return replace(
        tiles,
        rows=min(tiles.rows, padded(rows)),
        neurons=min(tiles.neurons, padded(neurons)),
        depth=min(tiles.depth, padded(spec.d)),
        columns=min(tiles.columns, padded(spec.d_out)),
    )


def few_constants(tiles: Tiles, one: bool, listed: bool) -> dict[str, int]:
    """Of ``few``, for one row or more; a list of experts takes registers that columns leave."""
    columns = min(tiles.columns, 128 if one else 64) if listed else tiles.columns
    rows = 1 if one else FEW_ROWS
    return dict(LISTED=listed, RP=rows, BH=tiles.neurons, BK=tiles.depth, BO=columns)


def score_tiles(spec: TritonSpec, one: bool) -> Tiles:
    """Of ``score``: many programs, as few neurons as a product takes. Not measured."""
    depth = min(padded(spec.d), 256 if one else 128)
    return Tiles(1 if one else FEW_ROWS, 16, depth, 16, 4, 2)


def score_route_tiles(spec: TritonSpec, width: int) -> Tiles:
    """Of ``score_route``: rows that fit a span, and warps that hold their scores. Not measured."""
    many = max(padded(width), padded(spec.experts)) > 64
    depth = 32 if spec.precision == "tf32x3" else 64
    return Tiles(64, 16, min(padded(spec.d), depth), 16, 8 if many else 4, 2)


def scores_fit(spec: TritonSpec, plan: str, width: int) -> bool:
    """Whether the kernels of a plan can take a router over; what is larger would spill.

    So would IEEE products of that many rows, which PyTorch's outrun anyway. Scores that weight
    experts are no router's.
    """
    if spec.scored:
        return False
    if plan == "few":
        return spec.experts <= 1024
    ieee = spec.dtype == "float32" and spec.precision == "ieee"
    return plan in ("lists", "pairs") and not ieee and max(width, spec.experts) <= 256


def grad_tiles(spec: TritonSpec) -> Tiles:
    """Of every kernel that differentiates: so that none spills, gated or not. Not measured."""
    neurons = min(32, padded(spec.expert_size))
    if spec.dtype != "float32":
        return Tiles(64, neurons, 32, 32, 4, 3)
    across = 64 if spec.precision == "ieee" else 32
    return Tiles(32, neurons, across, across, 4 if spec.precision == "tf32" else 8, 2)


_FEW_ONE = ((4, 1024, 2), (4, 1024, 4), (8, 512, 4), (8, 1024, 8), (16, 512, 8), (2, 1024, 2))
_FEW = ((16, 128, 2), (16, 256, 4), (32, 128, 4), (64, 64, 4), (64, 128, 8))
_WIDE = (
    Tiles(64, 64, 32, 64, 4, 2),
    Tiles(128, 64, 16, 64, 4, 3),
    Tiles(128, 128, 16, 128, 8, 3),
    Tiles(128, 64, 32, 64, 8, 3),
    Tiles(64, 128, 16, 128, 8, 3),
    Tiles(128, 128, 32, 64, 8, 2),
)
_NARROW = (
    Tiles(128, 128, 64, 128, 8, 4),
    Tiles(128, 128, 64, 64, 8, 3),
    Tiles(128, 128, 32, 128, 8, 4),
    Tiles(128, 64, 64, 128, 4, 3),
    Tiles(64, 128, 64, 128, 4, 3),
    Tiles(256, 128, 64, 128, 8, 3),
    Tiles(128, 128, 64, 256, 8, 3),
    Tiles(128, 256, 64, 128, 8, 3),
    Tiles(64, 64, 64, 128, 4, 4),
)


def candidates(spec: TritonSpec, plan: str, rows: int, family: Family = "hopper") -> list[Tiles]:
    """Tiles worth timing, the default first."""
    first = default_tiles(spec, plan, rows, family)
    if plan == "few":
        options = [
            replace(first, neurons=n, depth=k, warps=w)
            for n, k, w in (_FEW_ONE if rows == 1 else _FEW)
        ]
        return list(dict.fromkeys([first, *options]))
    if plan == "masked":
        return [first, replace(first, rows=16, neurons=256), replace(first, rows=64, warps=8)]
    options = list(_WIDE if spec.dtype == "float32" else _NARROW)
    if plan != "pairs":  # their second product is PyTorch's
        options = [replace(o, columns=first.columns) for o in options]
    most = spec.d_ff if plan == "blocks" else padded(spec.expert_size)
    fitting = [o for o in options if o.neurons <= most and o.rows <= max(64, padded(rows))]
    return list(dict.fromkeys([first, *fitting]))
