"""From a spec to Triton: every width a literal, only the lines that the block needs."""

import re
import textwrap

from .grads import GRADS, SLOPES
from .many import BLOCKS, FINISH, LISTS, PAIRS, WEIGHTED
from .routing import ROUTE, SCORE
from .spec import TritonSpec, padded

_ACTS = {
    "identity": "return v",
    "relu": "return tl.where(v < 0, 0.0, v)  # not a maximum: NaN stays NaN",
    "gelu": "return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))",
    "gelu_tanh": (
        "u = 0.7978845608028654 * (v + 0.044715 * v * v * v)\n"
        "return v * (1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0))"
    ),
    "silu": "return v / (1.0 + tl.exp(-v))",
    "gelu_quick": "return v / (1.0 + tl.exp(-1.702 * v))",
    "relu2": "return tl.where(v < 0, 0.0, v * v)",
}

_IMPORTS = '''
"""$name: d = $D, d_ff = $FF, d_out = $O, $E experts of $S. Generated; do not edit."""

import triton
import triton.language as tl
'''

_HEAD = (
    _IMPORTS
    + '''

@triton.jit
def activate(v):
    $act


@triton.jit
def limit_of(s, real, tau):
    """Below which score [rows] an expert rests: tau * max, in float32."""
    wide = s.to(tl.float32)
    most = tl.max(tl.where(real, wide, float("-inf")), 1)
    odd = tl.max((real & (wide != wide)).to(tl.int32), 1)
    return tl.where(odd > 0, float("nan"), tau * most)  # nothing is below NaN: every expert runs
'''
)

_FEW = '''
@triton.jit(do_not_specialize=["rows"])
def few(x, scores, tau, limits, active, total, w_in, b_in, w_gate, b_gate, w_out, b_out, sums, y,
        rows, LISTED: tl.constexpr, RP: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
        BO: tl.constexpr):
    """A program takes BH neurons and reads the weights of those that some row needs.

    LISTED, it takes them from the experts that `score` found: what no row needs is in no program.
    sums [rows, $O] and one float more, which counts programs that are done, are zero on entry. Of
    one row the last program to finish writes y; more are too much for one and left to `finish`.
    """
    row = tl.arange(0, RP)
    slot = tl.program_id(0) * BH + tl.arange(0, BH)
    if LISTED:
        held = slot // $S < tl.load(total)
        expert = tl.load(active + slot // $S, mask=held, other=0)
        neuron = expert * $S + slot % $S
        limit = tl.load(limits + row, mask=row < rows, other=0.0)
    else:
        held = slot < $FF
        expert = slot // $S
        neuron = slot
        every = tl.arange(0, $EP)  # ? ranked
        real = (row < rows)[:, None] & (every < $E)[None, :]  # ? ranked
        s = tl.load(scores + row[:, None] * $E + every[None, :], mask=real, other=0.0)  # ? ranked
        limit = limit_of(s, (every < $E)[None, :], tl.load(tau).to(tl.float32))  # ? ranked
        limit = tl.zeros([RP], tl.float32) + tl.load(tau).to(tl.float32)  # ? scored
    valid = (row < rows)[:, None] & held[None, :]
    mine = tl.load(scores + row[:, None] * $E + expert[None, :], mask=valid, other=0.0)
    runs = valid & ((mine.to(tl.float32) < limit[:, None]) == 0)  # ? ranked
    weight = mine.to(tl.float32)  # ? scored
    runs = valid & ((tl.abs(weight) < limit[:, None]) == 0)  # ? scored
    need = tl.max(runs.to(tl.int32), 0) > 0
    if tl.max(need.to(tl.int32), 0) > 0:
        at = neuron.to(tl.int64)
        up = tl.zeros([RP, BH], tl.float32)
        gate = tl.zeros([RP, BH], tl.float32)  # ? gated
        for k in range(0, $D, BK):
            inner = k + tl.arange(0, BK)
            here = (inner < $D)[None, :]
            a = tl.load(x + row[:, None] * $D + inner[None, :],
                        mask=here & (row < rows)[:, None], other=0.0)
            b = tl.load(w_in + at[:, None] * $D + inner[None, :],
                        mask=here & need[:, None], other=0.0)
            g = tl.load(w_gate + at[:, None] * $D + inner[None, :],  # ? gated
                        mask=here & need[:, None], other=0.0)  # ? gated
            if RP == 1:
                up += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)[None, :]
                gate += tl.sum(a.to(tl.float32) * g.to(tl.float32), 1)[None, :]  # ? gated
            else:
                up = tl.dot(a, tl.trans(b), up$precision)
                gate = tl.dot(a, tl.trans(g), gate$precision)  # ? gated
        up += tl.load(b_in + neuron, mask=need, other=0.0).to(tl.float32)[None, :]  # ? b_in
        gate += tl.load(b_gate + neuron, mask=need, other=0.0).to(tl.float32)[None, :]  # ? b_gate
        h = activate(gate) * up  # ? gated
        h = activate(up)  # ? plain
        h = up * weight  # ? scored
        h = tl.where(runs, h, 0.0)
        for c in range(0, $O, BO):
            column = c + tl.arange(0, BO)
            inside = (column < $O)[None, :]
            w = tl.load(w_out + at[:, None] * $O + column[None, :],
                        mask=inside & need[:, None], other=0.0)
            if RP == 1:
                part = tl.sum(tl.trans(h) * w.to(tl.float32), 0)[None, :]
            else:
                part = tl.dot(h.to(w.dtype), w$precision)
            tl.atomic_add(sums + row[:, None] * $O + column[None, :], part,
                          mask=inside & (row < rows)[:, None], sem="relaxed")
    if RP == 1:
        tl.debug_barrier()  # all of this program's sums are on their way before it says so
        if tl.atomic_add(sums + $O, 1.0, sem="acq_rel") == tl.num_programs(0) - 1:
            for c in range(0, $O, 1024):
                column = c + tl.arange(0, 1024)
                v = tl.load(sums + column, mask=column < $O, other=0.0)
                v += tl.load(b_out + column, mask=column < $O, other=0.0).to(tl.float32)  # ? b_out
                tl.store(y + column, v.to(y.dtype.element_ty), mask=column < $O)
'''


def emit(spec: TritonSpec) -> str:
    """The complete module of one block: a selection, and every way of running what it selects."""
    if spec.scored:  # a comparison selects, and experts are too small for tiles of their own
        return _text(spec, [_IMPORTS, _FEW, WEIGHTED, FINISH])
    return _text(spec, [_HEAD, SCORE, _FEW, BLOCKS, ROUTE, LISTS, PAIRS])


def emit_grads(spec: TritonSpec) -> str:
    """The module that differentiates one block; a part of its own, since few calls need it."""
    return _text(spec, [_HEAD, GRADS])


def _text(spec: TritonSpec, parts: list[str]) -> str:
    values = {
        "name": spec.name,
        "D": spec.d,
        "FF": spec.d_ff,
        "O": spec.d_out,
        "E": spec.experts,
        "EP": padded(spec.experts, 1),
        "EP16": padded(spec.experts),
        "S": spec.expert_size,
        "precision": f', input_precision="{spec.precision}"' if spec.dtype == "float32" else "",
    }
    if not spec.scored:
        values["act"] = textwrap.indent(_ACTS[spec.act], "    ").lstrip()
        values["slope"] = textwrap.indent(SLOPES[spec.act], "    ").lstrip()
    flags = {
        "gated": spec.gated,
        "plain": not spec.gated and not spec.scored,
        "scored": spec.scored,
        "ranked": not spec.scored,
        "b_in": spec.b_in,
        "b_gate": spec.b_gate,
        "b_out": spec.b_out,
        "whole": spec.d % 64 == 0,
        "ragged": spec.d % 64 != 0,
        "gated_whole": spec.gated and spec.d % 64 == 0,
        "gated_ragged": spec.gated and spec.d % 64 != 0,
    }
    return "\n\n".join(_fill(part, values, flags).strip() for part in parts) + "\n"


def _fill(text: str, values: dict[str, object], flags: dict[str, bool]) -> str:
    """Keep the lines whose condition (``# ? flag``) holds, and put the values in."""
    kept = []
    for line in text.splitlines():
        code, mark, flag = line.partition("  # ? ")
        if not mark or flags[flag]:
            kept.append(code)
    return re.sub(r"\$(\w+)", lambda m: str(values[m[1]]), "\n".join(kept))
