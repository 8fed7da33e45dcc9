"""Compile every kernel of a block for a device that need not be here, and report what it takes."""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...ir.block import DynkFFN
from ...ir.errors import CompileError
from ..spec import constants_of
from .emit import emit, emit_grads
from .load import interpreting, load
from .spec import (
    FEW_ROWS,
    MANY,
    SPAN,
    Family,
    Tiles,
    TritonSpec,
    default_tiles,
    few_constants,
    grad_tiles,
    padded,
    score_route_tiles,
    score_tiles,
    scores_fit,
    selection_rows,
)

FAMILIES: dict[str, Family] = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "hopper",
                               "gfx942": "cdna", "gfx90a": "cdna"}  # fmt: skip
TARGETS = tuple(FAMILIES)
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536,
                "gfx90a": 65536}  # fmt: skip
"""Bytes of shared memory that one program may ask for."""

WIDTH = 128
"""Of routers, as conversions make them; a constant of the kernels that compute scores."""

_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_MATRIX = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma_\w+")
_LOAD = re.compile(
    r"\bld\.global(?P<how>(?:[.:]+\w+)*)"
    r"|cp\.async\.c[ag]\.shared\.global(?:[.:]+\w+)* \[[^]]*\], \[[^]]*\], (?P<copied>\w+)"
    r"|\b(?:global|buffer)_load_(?P<amd>\w+)"
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel as it is compiled.

    Attributes:
        name: For people: the function and what distinguishes it.
        function: In the generated module.
        signature: Types of its arguments, in order; constants are among them.
        constants: Values of the constants.
        warps, stages: See :class:`skimp.codegen.triton.spec.Tiles`.
    """

    name: str
    function: str
    signature: dict[str, str]
    constants: dict[str, int]
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled kernel and what it takes.

    Attributes:
        spec: Of its block.
        kernel: Which.
        target: For which device.
        binary: Of a cubin or an hsaco.
        entry: The symbol to launch.
        parameters: It takes: arguments that are no constants, then pointers to scratch memory,
            which no kernel here asks for.
        shared: Bytes of shared memory.
        registers: Per thread.
        spills: Bytes (NVIDIA) or registers (AMD) that did not fit.
        programs: Estimate of how many share a multiprocessor.
        matrix: The matrix instruction it uses, or an empty string.
        wide_loads: Bytes that a thread loads by instructions that name 16 or more, loops once.
    """

    spec: TritonSpec
    kernel: Kernel
    target: str
    binary: bytes = field(repr=False)
    entry: str
    parameters: int
    shared: int
    registers: int
    spills: int
    programs: int
    matrix: str
    wide_loads: int

    @property
    def occupancy(self) -> float:
        """Estimated share of a multiprocessor's warps that are resident."""
        return self.programs * self.kernel.warps / _most_warps(self.target)

    def line(self) -> dict[str, Any]:
        """The row of a table."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        del known["spec"], known["binary"]
        more = {"kernel": self.kernel.name, "warps": self.kernel.warps}
        return known | more | {"occupancy": round(self.occupancy, 3)}


def spec_of(block: DynkFFN, dtype: str) -> TritonSpec:
    """The spec of a block of a converted model, with its weights stored as ``dtype``."""
    return TritonSpec(**constants_of(block.op_weights, block.expert_size, block.op_act, dtype))


def kernels(spec: TritonSpec, target: str = "sm_90", width: int = WIDTH) -> list[Kernel]:
    """Every kernel that calls of a block can launch, with default tiles.

    Args:
        spec: Of the block.
        target: One of :data:`TARGETS`.
        width: Of the router.
    """
    own, f32, i32 = _TYPES[spec.dtype], "*fp32", "*i32"
    scored, routed = dict(scores=own, tau=f32), dict(x=own, down=own, up=own, tau=f32)
    first = dict(w_in=own, b_in=own, w_gate=own, b_gate=own)
    listed = dict(x=own, lists=i32, counts=i32, tiles=i32, total=i32, **first)
    found: list[Kernel] = []

    def add(
        function: str, arguments: dict[str, str], constants: dict[str, int], tiles: Tiles | None,
        label: str = "",
    ) -> None:  # fmt: skip
        signature = arguments | dict.fromkeys(constants, "constexpr")
        warps, stages = (tiles.warps, tiles.stages) if tiles else (4, 3)
        found.append(Kernel(label or function, function, signature, constants, warps, stages))

    def default(plan: str, rows: int = MANY) -> Tiles:
        return default_tiles(spec, plan, rows, FAMILIES[target])

    def add_number(rows: int, rests: bool, label: str) -> None:
        sizes = {"BM": rows, "PER": SPAN // rows, "BE": 128, "RESTS": int(rests)}
        arguments = dict(counts=i32, tiles=i32, total=i32, entries="i32")
        if not any(k.function == "number" and k.constants == sizes for k in found):
            add("number", arguments, sizes, Tiles(0, 0, 0, 0, 8, 3), f"number-{label}")

    selected = dict(limits=f32, active=i32, total=i32)
    for rows in (1, FEW_ROWS):
        if scores_fit(spec, "few", width):
            tiles = score_tiles(spec, rows == 1)
            sizes = {"W": width, "RP": rows, "BH": tiles.neurons, "BK": tiles.depth}
            add("score", dict(**routed, sums=f32, scores=own, **selected, rows="i32"), sizes, tiles,
                f"score-{rows}-router-{width}")  # fmt: skip
        tiles = default("few", rows)
        for by_router in (False,) if spec.scored else (False, True):
            chosen = selected if by_router else dict.fromkeys(selected, own)  # not read
            add("few", dict(x=own, **scored, **chosen, **first, w_out=own, b_out=own, sums=f32,
                            y=own, rows="i32"),
                few_constants(tiles, rows == 1, by_router), tiles,
                f"few-{rows}" + "-listed" * by_router)  # fmt: skip
    if spec.scored:
        tiles = default("masked")
        add("weighted", dict(up=own, **scored, rows="i32"),
            {"BM": tiles.rows, "BH": tiles.neurons}, tiles)  # fmt: skip
        add("finish", dict(sums=f32, b_out=own, y=own, n="i32"), {"BN": 1024}, None)
        return found
    block = selection_rows(spec, "masked")
    add("thresholds", dict(**scored, limits=f32, rows="i32"), {"BR": block}, None)
    tiles = default("masked")
    sizes = {"BM": tiles.rows, "BH": tiles.neurons}
    add("masked", dict(up=own, gate=own, scores=own, limits=f32, rows="i32"), sizes, tiles)
    tiles = default("blocks")
    add("blocks", dict(x=own, scores=own, limits=f32, **first, h=own, rows="i32"),
        tiles.constants, tiles)  # fmt: skip
    block, into = selection_rows(spec, "pairs"), dict(counts=i32, lists=i32, rows="i32")
    for plan, function, more in (
        ("lists", "lists_hidden", dict(h=own, entries="i32")),
        ("pairs", "pairs", dict(w_out=own, sums=f32)),
    ):
        rests = plan == "lists"
        sizes = {"BR": block, "SPAN": SPAN, "RESTS": int(rests)}
        add("route", scored | into, sizes, None, f"route-{plan}")
        if scores_fit(spec, plan, width):
            tiles = score_route_tiles(spec, width)
            sizes = {"W": width, "WP": padded(width), "BR": tiles.rows, "BK": tiles.depth,
                     "SPAN": SPAN, "RESTS": int(rests)}  # fmt: skip
            add("score_route", routed | into, sizes, tiles, f"score_route-{plan}-router-{width}")
        tiles = default(plan)
        add_number(tiles.rows, rests, plan)
        add(function, listed | more, {"SPAN": SPAN, **tiles.constants}, tiles)
    add("finish", dict(sums=f32, b_out=own, y=own, n="i32"), {"BN": 1024}, None)
    tiles = grad_tiles(spec)
    add_number(tiles.rows, False, "grads")
    grown = dict(h=own, g_up=own, g_gate=own)
    add("grads_hidden", listed | dict(grad=own, w_out=own) | grown,
        {"SPAN": SPAN, **tiles.constants}, tiles)  # fmt: skip
    sizes = {"SPAN": SPAN, "BM": tiles.rows, "BH": tiles.neurons, "BK": tiles.depth}
    where = dict(lists=i32, counts=i32)
    for across, bias in dict.fromkeys(
        [(spec.d, spec.b_in or spec.b_gate), (spec.d, False), (spec.d_out, False)]
    ):
        add("grads_weight", where | dict(left=own, right=own, out=own, sums=own, spans="i32"),
            {"W": across, "SUM": int(bias)} | sizes, tiles, f"grads_weight-{across}"
            + "-bias" * bias)  # fmt: skip
    add("grads_input", where | dict(tiles=i32, total=i32, g_up=own, g_gate=own, w_in=own,
                                    w_gate=own, sums=f32), sizes, tiles)  # fmt: skip
    return found


def compile_kernel(spec: TritonSpec, kernel: Kernel, target: str) -> Compiled:
    """Compile one kernel of a block.

    Raises:
        CompileError: An unknown target, Triton missing or in interpreter mode, or a kernel that
            does not compile.
    """
    if target not in TARGETS:
        raise CompileError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    if interpreting():
        raise CompileError("nothing compiles while TRITON_INTERPRET is set; unset it")
    grads = kernel.function.startswith("grads_")
    module = load(emit_grads(spec), f"grads_{spec.name}") if grads else load(emit(spec), spec.name)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    # PyTorch's allocations are aligned; that is what lets loads be 16 bytes wide
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(kernel.signature.values())
        if kind.startswith("*") and list(kernel.signature)[i] != "total"
    }
    source = ASTSource(
        fn=getattr(module, kernel.function),
        signature=kernel.signature,
        constexprs=dict(kernel.constants),
        attrs=attributes,
    )
    options = dict(num_warps=kernel.warps, num_stages=kernel.stages)
    try:
        built: Any = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # Triton raises RuntimeError and many kinds of its own
        text = str(error).strip().splitlines()
        raise CompileError(
            f"{kernel.name} of {spec.name} does not compile for {target}: "
            f"{text[0] if text else type(error).__name__}"
        ) from error
    scratch = ("global_scratch_size", "profile_scratch_size")
    if any(getattr(built.metadata, size, 0) for size in scratch):
        raise CompileError(f"{kernel.name} of {spec.name} asks for scratch memory on {target}")
    text = built.asm["ptx" if cuda else "amdgcn"]
    registers, spills = _ptxas(text, target) if cuda else _amd(text)
    matrix = _MATRIX.search(text)
    return Compiled(
        spec, kernel, target, built.asm["cubin" if cuda else "hsaco"], built.metadata.name,
        _parameters(text) if cuda else sum(k != "constexpr" for k in kernel.signature.values()),
        int(built.metadata.shared), registers, spills,
        _resident(registers, int(built.metadata.shared), kernel.warps, target),
        matrix[0] if matrix else "", _wide_loads(text),
    )  # fmt: skip


def compile_all(spec: TritonSpec, target: str, width: int = WIDTH) -> list[Compiled]:
    """Compile what :func:`kernels` lists; see :func:`compile_kernel`."""
    return [compile_kernel(spec, kernel, target) for kernel in kernels(spec, target, width)]


def _parameters(text: str) -> int:
    """How many parameters the entry of a PTX module has."""
    return text.partition(".entry")[2].partition("{")[0].count(".param ")


def _wide_loads(text: str) -> int:
    """See :class:`Compiled`; of PTX or AMD's assembly."""
    return sum(n for n in map(_load_bytes, _LOAD.finditer(text)) if n >= 16)


def _load_bytes(found: re.Match[str]) -> int:
    if found["copied"]:
        return int(found["copied"], 0)
    if found["amd"]:
        times = re.match(r"dwordx(\d)", found["amd"])
        narrow = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2}
        return 4 * int(times[1]) if times else narrow.get(found["amd"].partition("_")[0], 4)
    vector, bits = re.search(r"\.v(\d)", found["how"]), re.search(r"\.[bfsu](\d+)$", found["how"])
    return (int(vector[1]) if vector else 1) * (int(bits[1]) // 8 if bits else 0)


def _ptxas(text: str, target: str) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as the assembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        named = re.search(r"^\.target (\w+)", text, re.MULTILINE)
        arch = named[1] if named else target
        got = subprocess.run(
            [_assembler(target), "-v", f"--gpu-name={arch}", str(source), "-o", "/dev/null"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    registers = re.search(r"Used (\d+) registers", got.stderr)
    if got.returncode or not registers:
        raise CompileError(f"ptxas refused a kernel for {target}: {got.stderr.strip()[:300]}")
    stores = re.search(r"(\d+) bytes spill stores", got.stderr)
    return int(registers[1]), int(stores[1]) if stores else 0


@functools.cache
def _assembler(target: str) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(int(target[3:])).path)


def _amd(text: str) -> tuple[int, int]:
    used = [int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text)]
    spilled = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)]
    return max(used, default=0), max(spilled, default=0)


def _most_warps(target: str) -> int:
    """Of a multiprocessor: on AMD, eight on each of four SIMD units."""
    return 64 if target.startswith("sm_") else 32


def _resident(registers: int, shared: int, warps: int, target: str) -> int:
    """Programs that fit a multiprocessor's registers, shared memory and warps."""
    registers = -(-max(1, registers) // 8) * 8
    if target.startswith("sm_"):  # 64K registers, and a KiB of shared memory kept per program
        by_registers = 65536 // (registers * 32 * warps)
        by_shared = (SHARED_LIMIT[target] + 1024) // (shared + 1024)
    else:  # 512 registers for every lane of a SIMD unit
        by_registers = 4 * min(8, 512 // registers) // warps
        by_shared = SHARED_LIMIT[target] // max(1, shared)
    return min(by_registers, by_shared, _most_warps(target) // warps)
