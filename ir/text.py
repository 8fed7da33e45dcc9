"""The text form: one typed line per block, which parses back.

encoder.layer.0.dynk: dynk_ffn<relu, 384 -> 1536 -> 384, 192 x 8, router 64, tau 0.1, f32>
encoder.layer.0.query.dynk: dynk_linear<relu, 384 -> 192 -> 384, 24 x 8, router 21, tau 0.1, f32>
"""

import re
from dataclasses import dataclass

import torch

from .block import DynkFFN

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}
_LINE = re.compile(
    r"(?P<name>\S*): (?P<kind>dense|dynk)_(?P<what>ffn|linear)<(?P<gated>gated )?(?P<act>\w+), "
    r"(?P<d>\d+) -> (?P<d_ff>\d+) -> (?P<d_out>\d+), (?P<experts>\d+) x (?P<expert_size>\d+), "
    r"router (?P<width>\d+|gate), tau (?P<tau>[-+.\de]+), (?P<dtype>\w+)>"
)


@dataclass(frozen=True, slots=True)
class BlockLine:
    """What one line says about a block."""

    name: str
    act: str
    gated: bool
    d: int
    d_ff: int
    d_out: int
    experts: int
    expert_size: int
    router_width: int
    tau: float
    dtype: str
    dense: bool
    linear: bool = False

    @classmethod
    def of(cls, name: str, block: DynkFFN) -> "BlockLine":
        """Describe a block."""
        return cls(
            name,
            block.act,
            block.gated,
            block.d,
            block.d_ff,
            block.d_out,
            block.experts,
            block.expert_size,
            block.router.width,
            float(block.tau),
            _DTYPES.get(block.w_in.dtype, str(block.w_in.dtype)),
            block.dense,
            block.linear,
        )

    def __str__(self) -> str:
        kind = ("dense" if self.dense else "dynk") + ("_linear" if self.linear else "_ffn")
        return (
            f"{self.name}: {kind}<{'gated ' if self.gated else ''}{self.act}, "
            f"{self.d} -> {self.d_ff} -> {self.d_out}, {self.experts} x {self.expert_size}, "
            f"router {self.router_width or 'gate'}, tau {self.tau!r}, {self.dtype}>"
        )


def parse(line: str) -> BlockLine:
    """Read a line back.

    Raises:
        ValueError: The line is not of this form.
    """
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise ValueError(f"not a block line: {line!r}; one looks like {_LINE_EXAMPLE}")
    return BlockLine(
        match["name"],
        match["act"],
        match["gated"] is not None,
        int(match["d"]),
        int(match["d_ff"]),
        int(match["d_out"]),
        int(match["experts"]),
        int(match["expert_size"]),
        0 if match["width"] == "gate" else int(match["width"]),
        float(match["tau"]),
        match["dtype"],
        match["kind"] == "dense",
        match["what"] == "linear",
    )


_LINE_EXAMPLE = "'mlp.dynk: dynk_ffn<relu, 8 -> 16 -> 8, 4 x 4, router 2, tau 0.1, f32>'"
