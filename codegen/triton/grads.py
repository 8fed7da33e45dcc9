"""The text of the kernels that differentiate a block, through the experts that ran.

One walk over the same lists of rows as forward gives the gradient of every hidden value that was
computed; two kernels then reduce over the rows of each expert, without atomics. Nothing is computed
for an expert and a row that it skipped.
"""

GRADS = '''
@triton.jit
def slope(v):
    """The derivative of the activation."""
    $slope


@triton.jit
def grads_hidden(x, lists, counts, tiles, total, w_in, b_in, w_gate, b_gate, grad, w_out, h, g_up,
                 g_gate, SPAN: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
                 BO: tl.constexpr):
    """For the rows of each list: activations h [rows, $FF] and gradients of what they came from."""
    for tile in range(tl.program_id(0), tl.load(total), tl.num_programs(0)):
        code = tl.load(tiles + tile)
        entry = code // (SPAN // BM)
        slot = code % (SPAN // BM) * BM + tl.arange(0, BM)
        live = slot < tl.load(counts + entry)
        row = tl.load(lists + entry.to(tl.int64) * SPAN + slot, mask=live, other=0).to(tl.int64)
        for n in range(0, $S, BH):
            offset = n + tl.arange(0, BH)
            inside = offset < $S
            neuron = entry % $E * $S + tl.minimum(offset, $S - 1)
            up = tl.zeros([BM, BH], tl.float32)
            gate = tl.zeros([BM, BH], tl.float32)  # ? gated
            for k in range(0, $D, BK):
                inner = k + tl.arange(0, BK)
                here = inner < $D
                a = tl.load(x + row[:, None] * $D + inner[None, :], mask=here[None, :], other=0.0)
                b = tl.load(w_in + neuron[None, :] * $D + inner[:, None], mask=here[:, None],
                            other=0.0)
                up = tl.dot(a, b, up$precision)
                b = tl.load(w_gate + neuron[None, :] * $D + inner[:, None],  # ? gated
                            mask=here[:, None], other=0.0)  # ? gated
                gate = tl.dot(a, b, gate$precision)  # ? gated
            up += tl.load(b_in + neuron).to(tl.float32)[None, :]  # ? b_in
            gate += tl.load(b_gate + neuron).to(tl.float32)[None, :]  # ? b_gate
            g = tl.zeros([BM, BH], tl.float32)
            for c in range(0, $O, BO):
                column = c + tl.arange(0, BO)
                here = column < $O
                a = tl.load(grad + row[:, None] * $O + column[None, :], mask=here[None, :],
                            other=0.0)
                b = tl.load(w_out + neuron[None, :] * $O + column[:, None], mask=here[:, None],
                            other=0.0)
                g = tl.dot(a, b, g$precision)
            at = row[:, None] * $FF + neuron[None, :]
            mask = live[:, None] & inside[None, :]
            act = activate(gate)  # ? gated
            value = act * up  # ? gated
            gg = g * up * slope(gate)  # ? gated
            gu = g * act  # ? gated
            tl.store(g_gate + at, gg.to(h.dtype.element_ty), mask=mask)  # ? gated
            value = activate(up)  # ? plain
            gu = g * slope(up)  # ? plain
            tl.store(g_up + at, gu.to(h.dtype.element_ty), mask=mask)
            tl.store(h + at, value.to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["spans"])
def grads_weight(lists, counts, left, right, out, sums, spans, W: tl.constexpr,
                 SUM: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr,
                 BK: tl.constexpr):
    """out [$FF, W]: left [rows, $FF] transposed times right [rows, W], over each expert's rows.

    With SUM also sums [$FF] of left. One program per tile of out adds all of it: no atomics.
    """
    across = tl.cdiv(W, BK)
    within = tl.cdiv($S, BH)
    expert = tl.program_id(0) // (across * within)
    offset = tl.program_id(0) // across % within * BH + tl.arange(0, BH)
    column = tl.program_id(0) % across * BK + tl.arange(0, BK)
    neuron = expert * $S + offset
    inside = offset < $S
    total = tl.zeros([BH, BK], tl.float32)
    alone = tl.zeros([BH], tl.float32)
    for span in range(0, spans):
        entry = span * $E + expert
        count = tl.load(counts + entry)
        for start in range(0, count, BM):
            slot = start + tl.arange(0, BM)
            live = slot < count
            row = tl.load(lists + entry.to(tl.int64) * SPAN + slot, mask=live, other=0)
            row = row.to(tl.int64)
            a = tl.load(left + row[:, None] * $FF + neuron[None, :],
                        mask=live[:, None] & inside[None, :], other=0.0)
            b = tl.load(right + row[:, None] * W + column[None, :],
                        mask=live[:, None] & (column < W)[None, :], other=0.0)
            total = tl.dot(tl.trans(a), b, total$precision)
            if SUM:
                alone += tl.sum(a.to(tl.float32), 0)
    at = neuron.to(tl.int64)[:, None] * W + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside[:, None] & (column < W)[None, :])
    if SUM:
        if tl.program_id(0) % across == 0:
            tl.store(sums + neuron, alone.to(sums.dtype.element_ty), mask=inside)


@triton.jit
def grads_input(lists, counts, tiles, total, g_up, g_gate, w_in, w_gate, sums, SPAN: tl.constexpr,
                BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):
    """sums [rows, $D], zero on entry: the gradient of the input, from that of hidden values."""
    for tile in range(tl.program_id(0), tl.load(total), tl.num_programs(0)):
        code = tl.load(tiles + tile)
        entry = code // (SPAN // BM)
        slot = code % (SPAN // BM) * BM + tl.arange(0, BM)
        live = slot < tl.load(counts + entry)
        row = tl.load(lists + entry.to(tl.int64) * SPAN + slot, mask=live, other=0).to(tl.int64)
        for c in range(0, $D, BK):
            column = c + tl.arange(0, BK)
            part = tl.zeros([BM, BK], tl.float32)
            for n in range(0, $S, BH):
                offset = n + tl.arange(0, BH)
                neuron = entry % $E * $S + offset
                mask = live[:, None] & (offset < $S)[None, :]
                both = (offset < $S)[:, None] & (column < $D)[None, :]
                a = tl.load(g_up + row[:, None] * $FF + neuron[None, :], mask=mask, other=0.0)
                b = tl.load(w_in + neuron[:, None] * $D + column[None, :], mask=both, other=0.0)
                part = tl.dot(a, b, part$precision)
                a = tl.load(g_gate + row[:, None] * $FF + neuron[None, :],  # ? gated
                            mask=mask, other=0.0)  # ? gated
                b = tl.load(w_gate + neuron[:, None] * $D + column[None, :],  # ? gated
                            mask=both, other=0.0)  # ? gated
                part = tl.dot(a, b, part$precision)  # ? gated
            tl.atomic_add(sums + row[:, None] * $D + column[None, :], part,
                          mask=live[:, None] & (column < $D)[None, :], sem="relaxed")
'''

SLOPES = {
    "identity": "return tl.full(v.shape, 1.0, tl.float32)",
    "relu": "return tl.where(v <= 0, 0.0, 1.0)",
    "gelu": (
        "cdf = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))\n"
        "return cdf + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)"
    ),
    "gelu_tanh": (
        "u = 0.7978845608028654 * (v + 0.044715 * v * v * v)\n"
        "t = 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0)\n"
        "return 0.5 * (1.0 + t) + 0.5 * v * (1.0 - t * t) * 0.7978845608028654 * (\n"
        "    1.0 + 0.134145 * v * v)"
    ),
    "silu": "s = 1.0 / (1.0 + tl.exp(-v))\nreturn s * (1.0 + v * (1.0 - s))",
    "gelu_quick": (
        "s = 1.0 / (1.0 + tl.exp(-1.702 * v))\nreturn s * (1.0 + 1.702 * v * (1.0 - s))"
    ),
    "relu2": "return tl.where(v <= 0, 0.0, 2.0 * v)",
}
"""Derivatives of the activations, by the names of :data:`skimp.ir.ACTIVATIONS`."""
