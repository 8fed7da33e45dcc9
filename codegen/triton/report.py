"""What each compiled kernel takes, and how fast a card could run it: a roofline, not a measurement.

The predicted time of a launch is the longer of its products at the device's peak and its memory
traffic at the device's bandwidth, both as the vendor publishes them; every input is read and every
output written once. Launches, atomics, caches that are missed and tiles that are not full cost
nothing in it, so that it is a bound from below.
"""

from dataclasses import dataclass
from typing import Any

from .aot import Compiled
from .spec import ITEM_BYTES, SPAN, TritonSpec


@dataclass(frozen=True, slots=True)
class Device:
    """A card as its vendor's data sheet has it.

    Attributes:
        name: Which.
        matrix: FLOP/s of dense 16-bit products.
        single: FLOP/s of float32 without tensor cores.
        bandwidth: Bytes per second of its memory.
    """

    name: str
    matrix: float
    single: float
    bandwidth: float


DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12),
    "sm_90": Device("H100 SXM", 989e12, 67e12, 3.35e12),
    "sm_100": Device("B200", 2250e12, 75e12, 8e12),
    "gfx942": Device("MI300X", 1307e12, 163.4e12, 5.3e12),
    "gfx90a": Device("MI250X, one of two dies", 191.5e12, 23.9e12, 1.638e12),
}


@dataclass(frozen=True, slots=True)
class Work:
    """What a kernel does; a multiply-add is two FLOPs, other arithmetic none.

    Attributes:
        tile_flops, tile_bytes: Of one tile; bytes include what a cache will serve.
        flops, traffic: Of a launch; traffic counts every byte once.
    """

    tile_flops: float
    tile_bytes: float
    flops: float
    traffic: float


def work(compiled: Compiled, rows: int, share: float) -> Work:
    """The work of one launch.

    Args:
        compiled: The kernel.
        rows: Of the call.
        share: Of the experts that a row needs, independently of other rows.
    """
    spec, c, function = compiled.spec, compiled.kernel.constants, compiled.kernel.function
    d, ff, o, e, s = spec.d, spec.d_ff, spec.d_out, spec.experts, spec.expert_size
    i, gates = ITEM_BYTES[spec.dtype], 2 if spec.gated else 1
    first, both = gates * d, gates * d + o  # weights of a neuron: before it, and all
    m, n = c.get("BM", 0), c.get("BH", 0)
    pairs = rows * share  # rows that an expert runs for
    if function == "few":
        needed = ff * (1 - (1 - share) ** rows)
        ends = rows * (d + e + o) * i + rows * o * 4
        return Work(2 * rows * n * both, n * both * i + ends,
                    2 * rows * needed * both, needed * both * i + ends)  # fmt: skip
    if function == "score":
        w = c["W"]
        ends = rows * (d + e) * i + rows * e * 4
        return Work(2 * rows * n * (d + e), n * (d + e) * i + ends,
                    2 * rows * w * (d + e), w * (d + e) * i + ends)  # fmt: skip
    if function in ("thresholds", "route"):
        rest = c.get("RESTS", 0)
        each = e * i + (4 if function == "thresholds" else 4 * e * (1 if rest else share))
        return Work(0, c["BR"] * each, 0, rows * each)
    if function == "number":
        entries = -(-rows // SPAN) * e
        size = entries * 4 * (1 + share * c["PER"])
        return Work(0, size, 0, size)
    if function == "masked":
        each = (gates * share + 1) * i
        return Work(0, m * n * each, 0, rows * ff * each)
    if function == "finish":
        return Work(0, c["BN"] * (4 + i), 0, rows * o * (4 + i))
    if function == "blocks":
        return Work(2 * m * n * first, (m * d + n * first + m * n) * i,
                    2 * rows * ff * first, (rows * (d + ff) + ff * first) * i)  # fmt: skip
    if function == "grads_weight":
        w, k = c["W"], c["BK"]
        return Work(2 * n * k * pairs, (pairs * (n + k) + n * k) * i,
                    2 * pairs * ff * w, (ff * (pairs + w) + rows * w) * i)  # fmt: skip
    # the others walk lists: a tile is the rows of one expert
    neuron, inputs, hidden, sums = {
        "lists_hidden": (first, d, 1, 0),
        "pairs": (both, d, 0, o),
        "grads_hidden": (both, d + o, 1 + gates, 0),
        "grads_input": (first, 0, gates, d),
    }[function]
    kept = 1.0 if function == "lists_hidden" else share  # which writes zeros, too
    tile = (m * (inputs + s * hidden) + s * neuron) * i + m * sums * 4
    traffic = (rows * inputs + ff * neuron + kept * rows * ff * hidden) * i + rows * sums * 4
    return Work(2 * m * s * neuron, tile, 2 * pairs * ff * neuron, traffic)


def rows_of(compiled: Compiled, many: int) -> int:
    """Rows of a call for which to predict: of a kernel for few rows, as many as it is for."""
    return compiled.kernel.constants.get("RP", many)


def line(compiled: Compiled, many: int = 16384, share: float = 0.3) -> dict[str, Any]:
    """The row of a table: what the compiler reports and what the roofline says.

    Args:
        compiled: The kernel.
        many: Rows of a call of kernels for many rows.
        share: See :func:`work`.
    """
    rows = rows_of(compiled, many)
    done, device = work(compiled, rows, share), DEVICES[compiled.target]
    peak = device.single if compiled.spec.dtype == "float32" else device.matrix
    by_memory, by_products = done.traffic / device.bandwidth, done.flops / peak
    return compiled.line() | {
        "tile_kflops": round(done.tile_flops / 1e3, 1),
        "tile_kbytes": round(done.tile_bytes / 1e3, 1),
        "rows": rows,
        "predicted_us": float(f"{max(by_memory, by_products) * 1e6:.3g}"),
        "bound": "memory" if by_memory >= by_products else "products",
    }


COLUMNS = {
    "kernel": "kernel", "registers": "registers", "spills": "spills", "shared": "shared bytes",
    "occupancy": "occupancy", "tile_kflops": "kFLOP a tile", "tile_kbytes": "kB a tile",
    "rows": "rows", "predicted_us": "predicted us", "bound": "bound by", "matrix": "matrix",
}  # fmt: skip
"""Keys of :func:`line`, and how tables call them."""


def document(compiled: list[Compiled], many: int = 16384, share: float = 0.3) -> str:
    """Every table, in Markdown, by spec and target."""
    parts = [
        "# GPU kernels: what they take",
        "Written by `python benchmarks/gpu.py --static`. Nothing here was measured. Registers, "
        "spills and shared memory are the compiler's own report (`ptxas -v`; metadata of AMD "
        "binaries); occupancy is the share of a multiprocessor's warps that registers and shared "
        "memory leave room for. The predicted time is a roofline, a bound from below: the longer "
        "of products at the peak and bytes at the bandwidth that the vendor publishes, every "
        f"input read once, {share:.0%} of the experts needed by each row at random.",
        "Spills are bytes on NVIDIA, registers on AMD. Tiles are the untuned defaults.",
        _table(
            ["target", "card", "16-bit TFLOP/s", "float32 TFLOP/s", "TB/s"],
            [[t, d.name, d.matrix / 1e12, d.single / 1e12, d.bandwidth / 1e12]
             for t, d in DEVICES.items()],
        ),
    ]  # fmt: skip
    for spec in dict.fromkeys(c.spec for c in compiled):
        parts.append(f"## {_title(spec)}")
        for target in dict.fromkeys(c.target for c in compiled):
            lines = [line(c, many, share) for c in compiled
                     if c.spec == spec and c.target == target]  # fmt: skip
            parts.append(f"### {target} ({DEVICES[target].name})")
            parts.append(_table(list(COLUMNS.values()), [[x[k] for k in COLUMNS] for x in lines]))
    return "\n\n".join(parts) + "\n"


def _title(spec: TritonSpec) -> str:
    kind = "gated " if spec.gated else ""
    return f"{kind}{spec.act}, {spec.d}/{spec.d_ff}, experts of {spec.expert_size}, {spec.dtype}"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([f"{v:g}" if isinstance(v, float) else str(v) for v in r]
                                          for r in rows)]  # fmt: skip
    return "\n".join("| " + " | ".join(r) + " |" for r in lines)
