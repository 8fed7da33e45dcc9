"""One library that holds the ops of a model and every kernel they need, for a life without Python.

The text is library.cpp with a resolver that knows its kernels by heart, where otherwise Python is
asked. The ops live in a namespace named by the text, so that any number of packages, and skimp
itself, can be in one process. Code that AOTInductor wrote calls them as C functions, whose names
hold the same digest.
"""

import ctypes
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import ArtefactError
from .build import build
from .emit import ACTS, emit
from .kernels import few_rows
from .library import OPS, describe
from .library import text as library_text
from .spec import FLAGS, KernelSpec, LinearSpec, detect_isa

_HEADERS = (
    "algorithm", "array", "atomic", "cmath", "cstdint", "cstdlib", "cstring", "exception",
    "iterator", "mutex", "new", "optional", "shared_mutex", "sstream", "string", "type_traits",
    "vector", "omp.h",
)  # fmt: skip
_FEATURES = {
    "avx512_bf16": ("avx512f", "avx512vl", "avx512bw", "avx512bf16"),
    "avx512": ("avx512f", "avx512vl"),
    "avx2": ("avx2", "fma"),
    "portable": (),
}
LEVELS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Instruction sets, each of which includes those before it."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A compiled library.

    Attributes:
        namespace: Of its ops.
        isa: The instruction set it needs.
        data: The file.
    """

    namespace: str
    isa: str
    data: bytes

    def op(self, name: str) -> Any:
        """One of :data:`skimp.codegen.cpp.library.OPS` in this library."""
        return getattr(getattr(torch.ops, self.namespace), named(name, self.namespace)).default

    @property
    def shims(self) -> dict[Any, list[str]]:
        """Declarations in C, by op, for ``aot_inductor.custom_ops_to_c_shims``."""
        suffix = _suffix(self.namespace)
        found = re.findall(r"^SHIM\((\w+)\)(\(.*?\)) \{", _shims_text(), re.MULTILINE | re.DOTALL)
        return {
            self.op(op): [f"AOTITorchError aoti_torch_cpu_{op}_{suffix}{' '.join(given.split())}"]
            for op, given in found
        }

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.data).hexdigest()


def _suffix(namespace: str) -> str:
    return namespace.removeprefix("skimp_")


def named(op: str, namespace: str) -> str:
    """An op's name in the library of a namespace: it becomes part of a C function's."""
    return f"{op}_{_suffix(namespace)}"


def _shims_text() -> str:
    return (Path(__file__).parent / "shims.cpp").read_text()


def key_of(spec: KernelSpec | LinearSpec) -> tuple[str, str]:
    """The kind and fields by which C++ asks for a kernel; see ``find`` in library.cpp."""
    narrow = spec.dtype == "bfloat16"
    if isinstance(spec, LinearSpec):
        fields = [spec.d, spec.d_out, spec.bias, narrow, 0, 0, 0, 0, 0]
        return "linear", ",".join(str(int(f)) for f in fields)
    fields = [
        ACTS.index(spec.act), spec.gated, spec.b_in, spec.b_gate, spec.b_out, spec.expert_size,
        spec.d, spec.d_ff, spec.d_out * 2 + narrow,
    ]  # fmt: skip
    return "dynk_ffn", ",".join(str(int(f)) for f in fields)


def kernels_text(specs: Iterable[KernelSpec | LinearSpec]) -> str:
    """Every kernel in a C++ namespace of its own, ``k0``, ``k1``, ..; headers come before."""
    parts = [f"#include <{name}>" for name in _HEADERS]
    parts.append("#if defined(__x86_64__)\n#include <immintrin.h>\n#endif")
    for i, spec in enumerate(specs):
        # headers are guarded, so what a kernel includes again inside its namespace is nothing
        text = re.sub(r'extern "C" int (dynk_ffn|linear)\(', r"static int \1(", emit(spec))
        parts.append(f"namespace k{i} {{\n{text}\n}}  // namespace k{i}")
        parts.append("#undef STORAGE_F32\n#undef STORAGE_BF16")
    return "\n".join(parts) + "\n"


def machine_text(isa: str) -> str:
    """A function that says what this machine lacks: null if nothing."""
    lines = [
        f'  if (!__builtin_cpu_supports("{f}")) return "this file was compiled for {isa}, and '
        f'this machine has no {f}: export the model again on such a machine";'
        for f in _FEATURES[isa]
    ]
    return "\n".join(
        [
            'extern "C" __attribute__((visibility("default"))) const char* skimp_unsupported() {',
            *lines,
            "  return nullptr;",
            "}\n",
        ]
    )


def emit_library(specs: Iterable[KernelSpec | LinearSpec]) -> tuple[str, str]:
    """The text of a library, and the namespace of its ops."""
    listed = sorted(set(specs), key=key_of)
    rows = []
    for i, spec in enumerate(listed):
        kind, fields = key_of(spec)
        rows.append(f'    {{"{kind}", "{fields}", {{(void*)&k{i}::{kind}, {few_rows(spec)}}}}},')
    isa = listed[0].isa if listed else "portable"
    ops = library_text() + _shims_text()
    # of two libraries in a process each has these to itself
    ops = ops.replace('extern "C" void ', "static void ")
    ops = ops.replace("static void skimp_forget()", "[[maybe_unused]] static void skimp_forget()")
    table = "\n".join(rows)
    text = (
        kernels_text(listed)
        + ops
        + machine_text(isa)
        + "static void resolve_here(const char* kind, const char* fields, Kernel* found) {\n"
        "  const char* lacking = skimp_unsupported();\n"
        '  STD_TORCH_CHECK(!lacking, "skimp: ", lacking);\n'
        "  static const struct { const char *kind, *fields; Kernel kernel; } TABLE[] = {\n"
        f'{table}\n    {{"", "", {{}}}},\n  }};\n'
        "  for (const auto& row : TABLE)\n"
        "    if (!std::strcmp(row.kind, kind) && !std::strcmp(row.fields, fields))\n"
        "      *found = row.kernel;\n"
        "}\n"
        "static const bool resolves_here = (skimp_resolve_with(&resolve_here), true);\n"
    )
    key = f"{text}{torch.__version__}"
    namespace = f"skimp_{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    text = re.sub(r"(STABLE_TORCH_LIBRARY(?:_IMPL)?\()skimp_cpu", rf"\g<1>{namespace}", text)
    text = re.sub(r'(\bm\.(?:def|impl)\(\s*"\w+)', rf"\g<1>_{_suffix(namespace)}", text)
    return f"#define SUFFIX {_suffix(namespace)}\n{text}", namespace


def bundle(specs: Iterable[KernelSpec | LinearSpec]) -> Bundle:
    """Compile a library and register its ops in this process.

    Args:
        specs: The kernels.

    Raises:
        CompileError: See :func:`skimp.codegen.cpp.build.build`.
    """
    listed = list(specs)
    text, namespace = emit_library(listed)
    isa = listed[0].isa if listed else "portable"
    root = Path(torch.__file__).parent
    library = build(
        text,
        namespace,
        (*FLAGS[isa], f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"),
    )
    describe(namespace, f"_{_suffix(namespace)}")
    _make_global(str(library._name))
    return Bundle(namespace, isa, Path(str(library._name)).read_bytes())


def _make_global(path: str) -> None:
    """Load a library, or find it loaded, so that models that are loaded later see its functions."""
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def check_machine(isa: str, where: str) -> None:
    """Refuse what this processor cannot run.

    Raises:
        ArtefactError: It needs another instruction set.
    """
    here = detect_isa()
    if isa not in LEVELS or LEVELS.index(isa) > LEVELS.index(here):
        raise ArtefactError(
            f"{where} was compiled for {isa}, and this machine has {here}; export the model again "
            "on a machine like this one"
        )


def load_bundle(path: Path, namespace: str) -> None:
    """Register the ops of a library file, unless they are.

    Raises:
        ArtefactError: It cannot be loaded.
    """

    def there() -> bool:
        return all(hasattr(getattr(torch.ops, namespace), named(name, namespace)) for name in OPS)

    if there():
        return
    try:
        _make_global(str(path))
    except OSError as error:
        raise ArtefactError(
            f"the kernel library {path} cannot be loaded: {error}; export the model again with "
            f"this torch ({torch.__version__})"
        ) from error
    if not there():
        raise ArtefactError(f"{path} does not hold the ops {namespace}; it is of another package")
