"""What each compiled kernel takes, and how fast a card could run it: a roofline, not a measurement.

The predicted time of a launch is the longer of its products at the device's peak and its memory
traffic at the device's bandwidth, both as the vendor publishes them; every input is read and every
output written once (the roofline model: Williams, Waterman, Patterson, CACM 52(4), 2009). Launches,
atomics, caches that are missed and tiles that are not full cost nothing in it, so that it is a
bound from below.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from .aot import FAMILIES, TARGETS, Compiled, Kernel
from .emit import emit, emit_grads
from .spec import ITEM_BYTES, SPAN, TritonSpec

_A100 = "https://www.nvidia.com/en-us/data-center/a100/"
_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_BLACKWELL = "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703"
_ROCM = "https://rocm.docs.amd.com/en/latest/conceptual/gpu-arch/"


@dataclass(frozen=True, slots=True)
class Device:
    """A card as its vendor publishes it; of figures given with sparsity, the half.

    Attributes:
        name: Which.
        matrix: FLOP/s of dense 16-bit products.
        tf32: FLOP/s of dense products in TF32, where there are such, else in float32.
        single: FLOP/s of float32 products in IEEE arithmetic.
        bandwidth: Bytes per second of its memory.
        source: Where the vendor says so.
    """

    name: str
    matrix: float
    tf32: float
    single: float
    bandwidth: float
    source: str

    def peak(self, spec: TritonSpec) -> float:
        """FLOP/s of the products of a block."""
        if spec.dtype != "float32":
            return self.matrix
        return {"ieee": self.single, "tf32": self.tf32, "tf32x3": self.tf32 / 3}[spec.precision]


DEVICES = {
    "sm_80": Device("A100 SXM 80 GB", 312e12, 156e12, 19.5e12, 2.039e12, _A100),
    "sm_90": Device("H100 SXM", 989.5e12, 494.5e12, 67e12, 3.35e12, _H100),
    "sm_100": Device("B200 of an HGX", 2250e12, 1100e12, 75e12, 7.7e12, _BLACKWELL),
    "gfx942": Device("MI300X", 1307.4e12, 653.7e12, 163.4e12, 5.3e12, _ROCM + "mi300.html"),
    # its table is of both dies of a card; a die is a device of its own
    "gfx90a": Device("MI250, one of two dies", 181.05e12, 45.25e12, 45.25e12, 1.6e12,
                     _ROCM + "mi250.html"),
}  # fmt: skip

PLAIN = TritonSpec("relu", False, True, False, True, 128, 768, 3072, 768, "bfloat16")
GATED = TritonSpec("silu", True, False, False, True, 64, 576, 1536, 576, "bfloat16")
SMALL = TritonSpec("relu", False, True, False, True, 8, 384, 1536, 384, "bfloat16")
LARGE = TritonSpec("silu", True, False, False, False, 128, 2048, 8192, 2048, "bfloat16")


def configurations() -> list[tuple[TritonSpec, str]]:
    """Blocks and targets of the report: every dtype and arithmetic, every class of default tiles.

    A paper's block, a small decoder's, an encoder's with small experts, and a large decoder's.
    """
    shapes = (PLAIN, GATED, SMALL, LARGE)
    found = [(spec, target) for spec in shapes for target in TARGETS]
    nvidia = [t for t in TARGETS if FAMILIES[t] != "cdna" and t != "sm_100"]
    for spec in shapes:
        found += [(replace(spec, dtype="float32"), t) for t in nvidia]
    for spec in shapes[:2]:
        found += [(replace(spec, dtype="float16"), t) for t in nvidia]
        for precision in ("tf32", "tf32x3"):
            found += [(replace(spec, dtype="float32", precision=precision), t) for t in nvidia]
    return found


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
    written = 4 * e * (1 if c.get("RESTS") else share)  # bytes of lists, of a row
    if function == "few":
        needed = ff * (1 - (1 - share) ** rows)
        ends = rows * (d + e + o) * i + rows * o * 4
        return Work(2 * rows * n * both, n * both * i + ends,
                    2 * rows * needed * both, needed * both * i + ends)  # fmt: skip
    if function == "score":
        w = c["W"]
        ends = rows * (d + e) * i + rows * (e + 1) * 4 + e * 4
        return Work(2 * rows * n * (d + e), n * (d + e) * i + ends,
                    2 * rows * w * (d + e), w * (d + e) * i + ends)  # fmt: skip
    if function == "score_route":
        w, b = c["W"], c["BR"]
        weights = w * (d + e) * i
        return Work(2 * b * w * (d + e), b * (d * i + written) + weights,
                    2 * rows * w * (d + e), rows * (d * i + written) + weights)  # fmt: skip
    if function in ("thresholds", "route"):
        each = e * i + (4 if function == "thresholds" else written)
        return Work(0, c["BR"] * each, 0, rows * each)
    if function == "number":
        entries = -(-rows // SPAN) * e
        size = entries * 4 * (1 + share * c["PER"])
        return Work(0, size, 0, size)
    if function in ("masked", "weighted"):
        each = (gates * share + 1) * i + (e / ff * i if spec.scored else 0)
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
    by_memory = done.traffic / device.bandwidth
    by_products = done.flops / device.peak(compiled.spec)
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


def digest(spec: TritonSpec, kernel: Kernel, target: str) -> str:
    """Of everything that a compiled kernel depends on but the compiler."""
    grads = kernel.function.startswith("grads_")
    text = emit_grads(spec) if grads else emit(spec)
    given = json.dumps([text, asdict(kernel), target], sort_keys=True)
    return hashlib.sha256(given.encode()).hexdigest()[:16]


def record(compiled: list[Compiled], triton: str) -> dict[str, Any]:
    """What ``benchmarks/results/gpu-static.json`` holds, and all that :func:`document` needs.

    Args:
        compiled: The kernels of :func:`configurations`.
        triton: Version of the compiler.
    """
    specs = {c.spec.name: asdict(c.spec) for c in compiled}
    lines = [line(c) | {"spec": c.spec.name, "digest": digest(c.spec, c.kernel, c.target)}
             for c in compiled]  # fmt: skip
    return {"triton": triton, "specs": specs, "kernels": lines}


def to_json(held: dict[str, Any]) -> str:
    """A :func:`record` as text, a kernel a line."""
    lines = ",\n".join(json.dumps(x) for x in held["kernels"])
    head = json.dumps({k: v for k, v in held.items() if k != "kernels"}, indent=1)
    return f'{head[:-2]},\n "kernels": [\n{lines}\n]}}\n'


def document(held: dict[str, Any]) -> str:
    """A :func:`record` in Markdown: all blocks in short, then two kernel by kernel."""
    specs = {name: TritonSpec(**fields) for name, fields in held["specs"].items()}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for x in held["kernels"]:
        groups.setdefault((x["spec"], x["target"]), []).append(x)
    parts = [
        "# GPU kernels: what they take",
        "Written by `python benchmarks/gpu.py --static` from `benchmarks/results/gpu-static.json`, "
        f"compiled by Triton {held['triton']} with its default tiles, untuned. Nothing here was "
        "measured. Registers, spills and shared memory are the compiler's own report (`ptxas -v`; "
        "metadata of AMD binaries); occupancy is the share of a multiprocessor's warps that "
        "registers and shared memory leave room for. The predicted time is a roofline, a bound "
        "from below: the longer of products at the peak and bytes at the bandwidth that the vendor "
        "publishes, every input read once, 30% of the experts needed by each row at random.",
        "Spills are bytes on NVIDIA, registers on AMD. Peaks are of dense products: half of what "
        "NVIDIA publishes with sparsity.",
        _table(
            ["target", "card", "16-bit TFLOP/s", "TF32 TFLOP/s", "float32 TFLOP/s", "TB/s", "from"],
            [[t, d.name, d.matrix / 1e12, d.tf32 / 1e12, d.single / 1e12, d.bandwidth / 1e12,
              f"<{d.source}>"] for t, d in DEVICES.items()],
        ),
        "## Every block compiled",
        _table(
            ["block", "target", "kernels", "that spill", "most registers", "most shared bytes"],
            [[title(specs[name]), target, len(g), _spilling(g), max(x["registers"] for x in g),
              max(x["shared"] for x in g)] for (name, target), g in groups.items()],
        ),
    ]  # fmt: skip
    for spec in (PLAIN, GATED):
        parts.append(f"## {title(spec)}")
        for target in TARGETS:
            parts.append(f"### {target} ({DEVICES[target].name})")
            lines = groups.get((spec.name, target), [])
            parts.append(_table(list(COLUMNS.values()), [[x[k] for k in COLUMNS] for x in lines]))
    return "\n\n".join(parts) + "\n"


def title(spec: TritonSpec) -> str:
    """A block in words."""
    kind = "gated " if spec.gated else ""
    how = f" ({spec.precision})" if spec.dtype == "float32" else ""
    size = f"{spec.d}/{spec.d_ff}, experts of {spec.expert_size}"
    return f"{kind}{spec.act}, {size}, {spec.dtype}{how}"


def _spilling(lines: list[dict[str, Any]]) -> str:
    found = [f"{x['kernel']} ({x['spills']})" for x in lines if x["spills"]]
    return ", ".join(found) or "none"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([f"{v:g}" if isinstance(v, float) else str(v) for v in r]
                                          for r in rows)]  # fmt: skip
    return "\n".join("| " + " | ".join(r) + " |" for r in lines)
