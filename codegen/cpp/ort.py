"""A library of ONNX Runtime's custom operators, with the kernels of one model."""

from collections.abc import Iterable
from pathlib import Path

from .build import build
from .bundle import kernels_text, key_of, machine_text
from .emit import ACTS
from .kernels import few_rows
from .spec import FLAGS, KernelSpec

_HERE = Path(__file__).parent
DOMAIN = "skimp"


def emit_operators(specs: Iterable[KernelSpec]) -> str:
    """The text of a library that registers an operator for each kind of block."""
    listed = sorted(set(specs), key=key_of)
    kernels: list[str] = []
    registered: dict[str, str] = {}
    for i, spec in enumerate(listed):
        act, gated = ACTS.index(spec.act), str(spec.gated).lower()
        widths = f"{spec.expert_size}, {spec.d}, {spec.d_ff}, {spec.d_out}"
        run = f"(Run)&k{i}::dynk_ffn, (Share)&k{i}::dynk_ffn_share"
        few = f"std::min<int64_t>({few_rows(spec)}, k{i}::FEW)"
        kernels.append(f"  {{{act}, {gated}, {widths}, {run}, {few}}},")
        name = operator_name(spec.act, spec.gated)
        registered[name] = f'  make("{name}", {act}, {gated}),'
    return "\n".join(
        [
            kernels_text(listed),
            machine_text(listed[0].isa),
            (_HERE / "pages.h").read_text(),
            (_HERE / "ort.cpp").read_text(),
            "const Kernel KERNELS[] = {",
            *kernels,
            f"}};\nconst size_t KERNEL_COUNT = {len(kernels)};",
            "const Operator OPERATORS[] = {",
            *registered.values(),
            f"}};\nconst size_t OPERATOR_COUNT = {len(registered)};\n",
        ]
    )


def operator_name(act: str, gated: bool) -> str:
    """Of a block, in the domain ``skimp``."""
    return f"DynkFfn_{'gated_' if gated else ''}{act}"


def compile_operators(specs: Iterable[KernelSpec]) -> Path:
    """Compile such a library, unless the cache holds it.

    Raises:
        CompileError: See :func:`skimp.codegen.cpp.build.build`.
    """
    listed = list(specs)
    library = build(emit_operators(listed), "onnxruntime", FLAGS[listed[0].isa])
    return Path(str(library._name))
