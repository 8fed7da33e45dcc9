"""What a CPU kernel is generated for."""

import functools
from dataclasses import dataclass

import torch

from ..spec import BlockSpec

_AVX512 = ("-mavx512f", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512")
FLAGS = {
    "avx512_bf16": (*_AVX512, "-mavx512bw", "-mavx512bf16"),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
LANES = {"avx512_bf16": 16, "avx512": 16, "avx2": 8, "portable": 4}


class _Compiled:
    """What every spec has: an instruction set, and so its flags."""

    __slots__ = ()
    isa: str

    @property
    def flags(self) -> tuple[str, ...]:
        """Compiler flags of the instruction set."""
        return FLAGS[self.isa]


@dataclass(frozen=True, slots=True)
class KernelSpec(_Compiled, BlockSpec):
    """Everything that is constant in the text of a kernel.

    Attributes:
        isa: ``avx512_bf16``, ``avx512``, ``avx2`` or ``portable``.
    """

    isa: str


@dataclass(frozen=True, slots=True)
class LinearSpec(_Compiled):
    """The same for a dense linear layer of few rows.

    Attributes:
        d, d_out: Widths.
        bias: There is one.
        dtype: ``float32`` or ``bfloat16``, of the storage; accumulation is float32.
        isa: ``avx512_bf16``, ``avx512``, ``avx2`` or ``portable``.
    """

    d: int
    d_out: int
    bias: bool
    dtype: str
    isa: str

    @property
    def d_ff(self) -> int:
        """Of no hidden layer."""
        return 0

    @property
    def name(self) -> str:
        """Readable and unique."""
        kind = "linear_bias" if self.bias else "linear"
        return f"{kind}_{self.d}_{self.d_out}_{self.dtype}_{self.isa}"


@functools.cache
def detect_isa() -> str:
    """The widest instruction set of this machine that kernels are written for."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "avx512"
    return "avx2" if capability == "AVX2" else "portable"
