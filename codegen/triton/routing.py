"""The text of the kernels that decide which experts run, of scores or of a router as well.

Every one of them thresholds, counts and compacts in one pass over its scores: places in a list come
from prefix sums, nothing is sorted, and how long a list became is known to the device alone. The
rule is that of :mod:`skimp.ir.op`; the router, ``abs(relu(x down^T) up^T)``, that of D2DMoE (arXiv
2310.04361, section 3.2).
"""

ROUTE = '''
@triton.jit
def append(chosen, row, entry, first, step, counts, lists):
    """Append rows to the lists of the experts that they chose [rows, experts].

    The list of an entry starts at `first` and goes by `step`; `counts` holds how long it is.
    """
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    count = tl.sum(chosen.to(tl.int32), 0)
    base = tl.atomic_add(counts + entry, count, mask=count > 0, sem="relaxed")
    at = first[None, :] + step * (base[None, :] + place)
    tl.store(lists + at, tl.broadcast_to(row[:, None], chosen.shape), mask=chosen)


@triton.jit
def list_rows(s, row, expert, tau, counts, lists, rows, SPAN: tl.constexpr, RESTS: tl.constexpr):
    """List rows under the experts that their scores s [rows, experts] select.

    One list per expert and span of SPAN rows: counts [spans, $E] is zero on entry; lists [spans,
    $E, SPAN]. Spans keep what one expert adds to in reach of the cache when the next one does. With
    RESTS the other rows fill the list from its end; their counts [spans, $E] follow the first.
    """
    real = (row < rows)[:, None] & (expert < $E)[None, :]
    limit = limit_of(s, (expert < $E)[None, :], tl.load(tau).to(tl.float32))
    runs = real & ((s.to(tl.float32) < limit[:, None]) == 0)
    entry = tl.program_id(0) * row.shape[0] // SPAN * $E + expert
    first = entry.to(tl.int64) * SPAN
    append(runs, row, entry, first, 1, counts, lists)
    if RESTS:
        after = counts + tl.cdiv(rows, SPAN) * $E
        append(real & (runs == 0), row, entry, first + SPAN - 1, -1, after, lists)


@triton.jit(do_not_specialize=["rows"])
def route(scores, tau, counts, lists, rows, BR: tl.constexpr, SPAN: tl.constexpr,
          RESTS: tl.constexpr):
    """List BR rows by their scores [rows, $E]: see `list_rows`."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    expert = tl.arange(0, $EP)
    real = (row < rows)[:, None] & (expert < $E)[None, :]
    s = tl.load(scores + row.to(tl.int64)[:, None] * $E + expert[None, :], mask=real, other=0.0)
    list_rows(s, row, expert, tau, counts, lists, rows, SPAN, RESTS)


@triton.jit(do_not_specialize=["rows"])
def score_route(x, down, up, tau, counts, lists, rows, W: tl.constexpr, WP: tl.constexpr,
                BR: tl.constexpr, BK: tl.constexpr, SPAN: tl.constexpr, RESTS: tl.constexpr):
    """List BR rows of x by the scores of a router with W hidden neurons, which stay on chip.

    Both products are rounded to the dtype of x, as they are where PyTorch computes them.
    """
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    near = tl.minimum(row, rows - 1).to(tl.int64)
    neuron = tl.arange(0, WP)
    h = tl.zeros([BR, WP], tl.float32)
    for k in range(0, $D, BK):
        inner = k + tl.arange(0, BK)
        a = tl.load(x + near[:, None] * $D + inner[None, :], mask=(inner < $D)[None, :], other=0.0)
        b = tl.load(down + neuron[None, :] * $D + inner[:, None],
                    mask=(inner < $D)[:, None] & (neuron < W)[None, :], other=0.0)
        h = tl.dot(a, b, h$precision)
    h = tl.where(h < 0, 0.0, h).to(x.dtype.element_ty)
    expert = tl.arange(0, $EP16)
    u = tl.load(up + expert[None, :] * W + neuron[:, None],
                mask=(expert < $E)[None, :] & (neuron < W)[:, None], other=0.0)
    s = tl.dot(h, u$precision)
    s = tl.where(s < 0, -s, s).to(x.dtype.element_ty)
    list_rows(s, row, expert, tau, counts, lists, rows, SPAN, RESTS)


@triton.jit(do_not_specialize=["entries"])
def number(counts, tiles, total, entries, BM: tl.constexpr, PER: tl.constexpr, BE: tl.constexpr,
           RESTS: tl.constexpr):
    """Number the tiles of all lists, entry * PER + part, in one program; total [1] counts them.

    With RESTS a list without rows has a tile too.
    """
    done = 0
    for start in range(0, entries, BE):
        entry = start + tl.arange(0, BE)
        count = tl.cdiv(tl.load(counts + entry, mask=entry < entries, other=0), BM)
        if RESTS:
            count = tl.where(entry < entries, tl.maximum(count, 1), 0)
        first = done + tl.cumsum(count, 0) - count
        part = tl.arange(0, PER)[None, :]
        tl.store(tiles + first[:, None] + part, entry[:, None] * PER + part,
                 mask=part < count[:, None])
        done += tl.sum(count, 0)
    tl.store(total, done)
'''

SCORE = '''
@triton.jit(do_not_specialize=["rows"])
def score(x, down, up, tau, sums, scores, limits, active, total, rows, W: tl.constexpr,
          RP: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):
    """The scores [rows, $E] of a router with W hidden neurons, and the experts that they select.

    A program takes BH neurons. sums [rows, $E] and one float more, which counts programs that are
    done, are zero on entry; the last program writes the scores, below which score an expert rests
    (limits [rows]), and the experts that some row needs, in order (active [total]). Both products
    are rounded to the dtype of x, as they are where PyTorch computes them.
    """
    row = tl.arange(0, RP)
    neuron = tl.program_id(0) * BH + tl.arange(0, BH)
    h = tl.zeros([RP, BH], tl.float32)
    for k in range(0, $D, BK):
        inner = k + tl.arange(0, BK)
        here = (inner < $D)[None, :]
        a = tl.load(x + row[:, None] * $D + inner[None, :], mask=here & (row < rows)[:, None],
                    other=0.0)
        b = tl.load(down + neuron[:, None] * $D + inner[None, :],
                    mask=here & (neuron < W)[:, None], other=0.0)
        if RP == 1:
            h += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)[None, :]
        else:
            h = tl.dot(a, tl.trans(b), h$precision)
    h = tl.where(h < 0, 0.0, h).to(x.dtype.element_ty)
    expert = tl.arange(0, $EP16)
    real = (row < rows)[:, None] & (expert < $E)[None, :]
    u = tl.load(up + expert[:, None] * W + neuron[None, :],
                mask=(expert < $E)[:, None] & (neuron < W)[None, :], other=0.0)
    if RP == 1:
        part = tl.sum(h.to(tl.float32) * u.to(tl.float32), 1)[None, :]
    else:
        part = tl.dot(h, tl.trans(u)$precision)
    at = row[:, None] * $E + expert[None, :]
    tl.atomic_add(sums + at, part, mask=real, sem="relaxed")
    tl.debug_barrier()  # all of this program's sums are on their way before it says so
    if tl.atomic_add(sums + rows * $E, 1.0, sem="acq_rel") == tl.num_programs(0) - 1:
        s = tl.load(sums + at, mask=real, other=0.0)
        s = tl.where(s < 0, -s, s).to(scores.dtype.element_ty)
        tl.store(scores + at, s, mask=real)
        limit = limit_of(s, (expert < $E)[None, :], tl.load(tau).to(tl.float32))
        tl.store(limits + row, limit, mask=row < rows)
        runs = real & ((s.to(tl.float32) < limit[:, None]) == 0)
        need = tl.max(runs.to(tl.int32), 0)
        tl.store(active + tl.cumsum(need, 0) - need, expert, mask=need > 0)
        tl.store(total, tl.sum(need, 0))
'''
