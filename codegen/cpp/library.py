"""The ops that lowered graphs call on CPU, in C++ on libtorch's stable ABI.

``skimp_cpu::dynk_ffn`` and ``skimp_cpu::linear`` compute what ``skimp::dynk_ffn`` and
``aten::linear`` do, ``skimp_cpu::routed_ffn`` a block with its router, ``skimp_cpu::linears``
several layers of one shape that read the same rows. They are for inference:
without a gradient there is nothing of Python between a compiled graph and a kernel. The library is
compiled once per machine.
"""

import ctypes
import functools
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .build import build

OPS = ("dynk_ffn", "routed_ffn", "linear", "linears")


class Found(ctypes.Structure):
    """A kernel's address, and the number of rows up to which it counts as few."""

    _fields_ = [("run", ctypes.c_void_p), ("few", ctypes.c_int64)]


_Resolve = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Found))
_callbacks: list[object] = []  # C++ holds pointers to these for as long as the process lives

Resolver = Callable[[str, tuple[int, ...]], tuple[int, int]]
"""From the kind of a kernel and what it is constant in to its address (0: none) and few rows."""


def text() -> str:
    """Of the library, but for whom it asks for kernels."""
    here = Path(__file__).parent
    return (here / "pages.h").read_text() + (here / "library.cpp").read_text()


@functools.cache
def load(resolver: Resolver) -> ctypes.CDLL:
    """Register the ops.

    Args:
        resolver: Asked once for every kind of arguments; must not raise.

    Raises:
        CompileError: The library does not compile or load; see :func:`build`.
    """
    root = Path(torch.__file__).parent
    library = build(
        text(),
        f"library_torch{torch.__version__}_{sysconfig.get_platform()}",
        (f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"),
    )

    def resolve(kind: bytes, fields: bytes, found: "ctypes._Pointer[Found]") -> None:
        values = tuple(int(v) for v in fields.decode().split(","))
        found.contents.run, found.contents.few = resolver(kind.decode(), values)

    _callbacks.append(_Resolve(resolve))
    library.skimp_resolve_with(_callbacks[-1])
    describe("skimp_cpu")
    return library


@functools.cache
def describe(namespace: str, suffix: str = "") -> None:
    """Tell tracing about the shapes that registered ops return, and that they have no gradient.

    Args:
        namespace: Of the ops.
        suffix: Of their names.
    """
    register = torch.library.register_fake
    register(f"{namespace}::linear{suffix}", lambda x, w, b: _rows(x, w.shape[0]))
    register(f"{namespace}::linears{suffix}", lambda x, ws, bs: [_rows(x, w.shape[0]) for w in ws])
    register(
        f"{namespace}::dynk_ffn{suffix}",
        lambda x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, *_: _rows(x, w_out.shape[1]),
    )
    register(
        f"{namespace}::routed_ffn{suffix}",
        lambda x, down, up, tau, w_in, b_in, w_gate, b_gate, w_out, *_: _rows(x, w_out.shape[1]),
    )
    for name in OPS:  # nothing to differentiate, so nothing to look at
        op = f"{namespace}::{name}{suffix}"
        torch.library.impl(op, "Autograd", torch.library.fallthrough_kernel)


def _rows(x: Tensor, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], columns))
