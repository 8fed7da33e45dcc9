"""The text of the kernels for many rows. A line that ends in ``# ? flag`` is there if it holds."""

# First product and activation of one tile, from `row`s that are valid addresses and `neuron`s;
# used by every kernel below, so that all of them compute a neuron alike.
_HIDDEN = '''
@triton.jit
def hidden(x, w_in, b_in, w_gate, b_gate, row, neuron, real,
           BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):
    """Activations [BM, BH] of neurons for rows of x; neurons that are not real give garbage."""
    up = tl.zeros([BM, BH], tl.float32)
    gate = tl.zeros([BM, BH], tl.float32)  # ? gated
    inner = tl.arange(0, BK)
    xs = x + row.to(tl.int64)[:, None] * $D + inner[None, :]
    ws = w_in + neuron[None, :] * $D + inner[:, None]
    gs = w_gate + neuron[None, :] * $D + inner[:, None]  # ? gated
    for k in range(0, $D, BK):
        a = tl.load(xs + k)  # ? whole
        b = tl.load(ws + k)  # ? whole
        a = tl.load(xs + k, mask=(k + inner < $D)[None, :], other=0.0)  # ? ragged
        b = tl.load(ws + k, mask=(k + inner < $D)[:, None], other=0.0)  # ? ragged
        up = tl.dot(a, b, up$precision)
        g = tl.load(gs + k)  # ? gated_whole
        g = tl.load(gs + k, mask=(k + inner < $D)[:, None], other=0.0)  # ? gated_ragged
        gate = tl.dot(a, g, gate$precision)  # ? gated
    up += tl.load(b_in + neuron).to(tl.float32)[None, :]  # ? b_in
    gate += tl.load(b_gate + neuron).to(tl.float32)[None, :]  # ? b_gate
    return activate(gate) * up  # ? gated
    return activate(up)  # ? plain
'''

BLOCKS = (
    _HIDDEN
    + '''

@triton.jit(do_not_specialize=["rows"])
def thresholds(scores, tau, limits, rows, BR: tl.constexpr):
    """limits [rows]: below which score an expert rests; NaN where all run."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    expert = tl.arange(0, $EP)
    real = (row < rows)[:, None] & (expert < $E)[None, :]
    s = tl.load(scores + row.to(tl.int64)[:, None] * $E + expert[None, :], mask=real, other=0.0)
    limit = limit_of(s, (expert < $E)[None, :], tl.load(tau).to(tl.float32))
    tl.store(limits + row, limit, mask=row < rows)


@triton.jit
def running(scores, limits, row, first, rows, BM: tl.constexpr, BH: tl.constexpr):
    """Which neurons [BM, BH] run, from the first of them; rows beyond the last run none."""
    neuron = first + tl.arange(0, BH)
    limit = tl.load(limits + row, mask=row < rows, other=0.0)
    near = tl.minimum(row, rows - 1)
    score = scores + near.to(tl.int64)[:, None] * $E
    if $S % BH == 0:
        s = tl.load(score + first // $S).to(tl.float32)
        runs = tl.broadcast_to((s < limit[:, None]) == 0, [BM, BH])
    elif BH % $S == 0:  # each score is loaded once, and then spread over its neurons
        group = tl.minimum(first // $S + tl.arange(0, BH // $S), $E - 1)
        s = tl.load(score + group[None, :]).to(tl.float32)
        each = ((s < limit[:, None]) == 0).to(tl.int8)
        runs = tl.reshape(tl.broadcast_to(each[:, :, None], [BM, BH // $S, $S]), [BM, BH]) != 0
    else:
        s = tl.load(score + (tl.minimum(neuron, $FF - 1) // $S)[None, :]).to(tl.float32)
        runs = (s < limit[:, None]) == 0
    return runs & (neuron < $FF)[None, :] & (row < rows)[:, None]


@triton.jit(do_not_specialize=["rows"])
def masked(up, gate, scores, limits, rows, BM: tl.constexpr, BH: tl.constexpr):
    """up [rows, $FF] becomes the activations, zero where an expert rests; gate alike."""
    across = tl.cdiv($FF, BH)
    row = tl.program_id(0) // across * BM + tl.arange(0, BM)
    first = tl.program_id(0) % across * BH
    neuron = first + tl.arange(0, BH)
    runs = running(scores, limits, row, first, rows, BM, BH)
    at = row.to(tl.int64)[:, None] * $FF + neuron[None, :]
    inside = (neuron < $FF)[None, :] & (row < rows)[:, None]
    v = tl.load(up + at, mask=runs, other=0.0).to(tl.float32)
    v = activate(tl.load(gate + at, mask=runs, other=0.0).to(tl.float32)) * v  # ? gated
    v = activate(v)  # ? plain
    tl.store(up + at, tl.where(runs, v, 0.0).to(up.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def blocks(x, scores, limits, w_in, b_in, w_gate, b_gate, h, rows,
           BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr):
    """h [rows, $FF]: a block of rows against a block of neurons, zero where an expert rests.

    A block that no row needs is not computed.
    """
    down = tl.cdiv(rows, BM)
    across = tl.cdiv($FF, BH)
    band = tl.program_id(0) // (8 * across)  # eight blocks of rows share what they read
    height = tl.minimum(down - band * 8, 8)
    within = tl.program_id(0) % (8 * across)
    row = (band * 8 + within % height) * BM + tl.arange(0, BM)
    first = within // height * BH
    neuron = first + tl.arange(0, BH)
    real = neuron < $FF
    runs = running(scores, limits, row, first, rows, BM, BH)
    near = tl.minimum(row, rows - 1)
    out = h + row.to(tl.int64)[:, None] * $FF + neuron[None, :]
    inside = real[None, :] & (row < rows)[:, None]
    if tl.max(tl.max(runs.to(tl.int32), 1), 0) > 0:
        value = hidden(x, w_in, b_in, w_gate, b_gate, near, tl.minimum(neuron, $FF - 1), real,
                       BM, BH, BK)
        tl.store(out, tl.where(runs, value, 0.0).to(h.dtype.element_ty), mask=inside)
    else:
        tl.store(out, tl.zeros([BM, BH], h.dtype.element_ty), mask=inside)
'''
)

_WALK_HEAD = """
    for tile in range(tl.program_id(0), tl.load(total), tl.num_programs(0)):
        code = tl.load(tiles + tile)
        entry = code // (SPAN // BM)
""".lstrip("\n")

_WALK = """
        slot = code % (SPAN // BM) * BM + tl.arange(0, BM)
        live = slot < tl.load(counts + entry)
        row = tl.load(lists + entry.to(tl.int64) * SPAN + slot, mask=live, other=0)
        for n in range(0, $S, BH):
            inside = n + tl.arange(0, BH) < $S
            if $S % BH == 0:
                neuron = entry % $E * $S + n + tl.arange(0, BH)
            else:  # a minimum hides from the compiler that addresses are adjacent
                neuron = entry % $E * $S + tl.minimum(n + tl.arange(0, BH), $S - 1)
            value = hidden(x, w_in, b_in, w_gate, b_gate, row, neuron, inside, BM, BH, BK)
""".lstrip("\n")

LISTS = f'''
@triton.jit(do_not_specialize=["entries"])
def lists_hidden(x, lists, counts, tiles, total, w_in, b_in, w_gate, b_gate, h, entries,
                 SPAN: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
                 BO: tl.constexpr):
    """h [rows, $FF]: the activations of each expert for the rows of its list, zero for others.

    A tile also writes its share of the zeros, which pass to memory while it multiplies.
    """
{_WALK_HEAD}        count = tl.load(counts + entry)
        rest = tl.load(counts + entries + entry)
        step = tl.maximum(tl.cdiv(count, BM), 1) * BM
        for z in range(code % (SPAN // BM) * BM, rest, step):
            back = z + tl.arange(0, BM)
            idle = tl.load(lists + entry.to(tl.int64) * SPAN + SPAN - 1 - back, mask=back < rest,
                           other=0)
            for n in range(0, $S, BH):
                offset = n + tl.arange(0, BH)
                out = h + idle.to(tl.int64)[:, None] * $FF + (entry % $E * $S + offset)[None, :]
                tl.store(out, tl.zeros([BM, BH], h.dtype.element_ty),
                         mask=(back < rest)[:, None] & (offset < $S)[None, :])
{_WALK}            out = h + row.to(tl.int64)[:, None] * $FF + neuron[None, :]
            tl.store(out, value.to(h.dtype.element_ty), mask=live[:, None] & inside[None, :])
'''

_PAIRS = f'''
@triton.jit
def pairs(x, lists, counts, tiles, total, w_in, b_in, w_gate, b_gate, w_out, sums,
          SPAN: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr,
          BO: tl.constexpr):
    """sums [rows, $O], zero on entry: both products of a tile, its hidden values kept on chip."""
{_WALK_HEAD}{_WALK}            if $S % BH != 0:
                value = tl.where(inside[None, :], value, 0.0)
            value = value.to(w_out.dtype.element_ty)
            for c in range(0, $O, BO):
                column = c + tl.arange(0, BO)
                w = tl.load(w_out + neuron[:, None] * $O + column[None, :],
                            mask=(column < $O)[None, :], other=0.0)
                part = tl.dot(value, w$precision)
                tl.atomic_add(sums + row.to(tl.int64)[:, None] * $O + column[None, :], part,
                              mask=live[:, None] & (column < $O)[None, :], sem="relaxed")
'''

FINISH = '''
@triton.jit(do_not_specialize=["n"])
def finish(sums, b_out, y, n, BN: tl.constexpr):
    """y [rows, $O] = sums + b_out, in the dtype of y."""
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    v = tl.load(sums + at, mask=at < n, other=0.0)
    v += tl.load(b_out + at % $O, mask=at < n, other=0.0).to(tl.float32)  # ? b_out
    tl.store(y + at, v.to(y.dtype.element_ty), mask=at < n)
'''

PAIRS = f"{_PAIRS}\n{FINISH}"

WEIGHTED = '''
@triton.jit(do_not_specialize=["rows"])
def weighted(up, scores, tau, rows, BM: tl.constexpr, BH: tl.constexpr):
    """up [rows, $FF] becomes weighted by the scores [rows, $E], zero where an expert rests."""
    across = tl.cdiv($FF, BH)
    row = tl.program_id(0) // across * BM + tl.arange(0, BM)
    neuron = tl.program_id(0) % across * BH + tl.arange(0, BH)
    inside = (neuron < $FF)[None, :] & (row < rows)[:, None]
    score = scores + row.to(tl.int64)[:, None] * $E + (neuron // $S)[None, :]
    weight = tl.load(score, mask=inside, other=0.0).to(tl.float32)
    runs = inside & ((tl.abs(weight) < tl.load(tau).to(tl.float32)) == 0)
    at = row.to(tl.int64)[:, None] * $FF + neuron[None, :]
    v = tl.load(up + at, mask=runs, other=0.0).to(tl.float32) * weight
    tl.store(up + at, tl.where(runs, v, 0.0).to(up.dtype.element_ty), mask=inside)
'''
