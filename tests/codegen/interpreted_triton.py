"""Run by test_triton.py in a process where Triton interprets: numbers against the reference."""

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skimp.codegen.triton import kernels as K
from skimp.codegen.triton import launch as launches
from skimp.codegen.triton import tuned
from skimp.codegen.triton.backward import differentiate, gradients
from skimp.codegen.triton.launch import Launch, run
from skimp.codegen.triton.spec import TritonSpec, default_tiles
from skimp.codegen.triton.tune import plans, tune
from skimp.ir import reference
from skimp.ir.op import SCORED, reference_backward, select
from triton.runtime import interpreter

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities

# (d, d_ff, d_out, expert size, gated, biases, act)
CASES = [
    (13, 30, 13, 5, False, True, "gelu"),
    (16, 24, 40, 3, True, False, "silu"),
    (40, 32, 104, 8, False, True, "relu"),
    (33, 12, 7, 1, True, True, "gelu_tanh"),
    (64, 192, 80, 64, True, True, "silu"),
    (24, 48, 24, 48, False, False, "identity"),  # one expert
    (16, 24, 40, 3, True, True, "gelu_quick"),
    (16, 24, 24, 8, False, True, "relu2"),
    (40, 30, 104, 1, False, True, "scored"),
    (13, 30, 13, 5, False, False, "scored"),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True, scope="module")
def bfloat16_as_devices_have_it():
    """The interpreter multiplies its bits as integers, and cuts off what devices round to even.

    PyTorch's own product on a CPU with AMX lets a NaN of the next row into one where an odd number
    of values is summed: 129 rows of 5, of which row 64 is NaN, give it in row 63 too.
    """
    wide = pytest.MonkeyPatch()
    for name in ("_product", "_second"):
        wide.setattr(launches, name, widened(getattr(launches, name)))
    builder = interpreter.InterpreterBuilder
    plain, cut = builder.create_dot, builder.create_fp_trunc

    def widen(t):
        if t.dtype.scalar != tl.bfloat16:
            return t
        bits = (t.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(bits, tl.float32)

    def dot(self, a, b, d, precision, imprecise):
        return plain(self, widen(a), widen(b), d, precision, imprecise)

    def trunc(self, src, dst_type):
        if dst_type.scalar != tl.bfloat16 or src.dtype.scalar != tl.float32:
            return cut(self, src, dst_type)
        bits = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(bits.numpy(), tl.bfloat16)

    builder.create_dot, builder.create_fp_trunc = dot, trunc
    yield
    builder.create_dot, builder.create_fp_trunc = plain, cut
    wide.undo()


def widened(product):
    """A product in float32, rounded once."""

    def call(*given):
        floats = [t if t is None else t.float() for t in given]
        return product(*floats).to(given[0].dtype)

    return call


@pytest.fixture(autouse=True, scope="module")
def poisoned_buffers():
    """Whatever a kernel does not write is seen."""
    made, patch = torch.empty, pytest.MonkeyPatch()
    patch.setattr(torch, "empty", lambda *a, **k: poison(made(*a, **k)))
    new = torch.Tensor.new_empty
    patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new(*a, **k)))
    yield
    patch.undo()


def poison(t):
    return t.fill_(float("nan") if t.is_floating_point() else 1 << 30)


def make(case, rows, dtype=torch.float32, seed=0, share=0.5):
    d, d_ff, d_out, e, gated, bias, act = case
    g = torch.Generator().manual_seed(seed)

    def r(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    scores = torch.rand(rows, d_ff // e, generator=g)
    scores = torch.where(scores < share, scores * 0.1, scores).to(dtype)
    if act == SCORED:
        scores = (scores * torch.randn(scores.shape, generator=g)).to(dtype)
    return [
        r(rows, d), scores, torch.tensor(0.3), r(d_ff, d, scale=d**-0.5),
        r(d_ff) if bias else None, r(d_ff, d, scale=d**-0.5) if gated else None,
        r(d_ff) if gated and bias else None, r(d_ff, d_out, scale=d_ff**-0.5),
        r(d_out) if bias else None, e, act,
    ]  # fmt: skip


def check(args):
    x, scores = args[:2]
    spec = K._prepare(x, scores, tuple(args[3:9]), args[9], args[10], "ieee")
    assert isinstance(spec, TritonSpec), spec
    double = [t.double() if isinstance(t, torch.Tensor) and i != 1 else t
              for i, t in enumerate(args)]  # fmt: skip
    want = reference(*double)
    ok = want.isfinite()
    rows = x.shape[0]
    any_rows = () if spec.scored else ("pairs", "lists", "blocks")
    for plan in {*plans(spec, rows), *any_rows}:
        got = run(spec, plan, *args[:9])
        assert got.dtype == x.dtype
        assert torch.equal(got.isnan(), want.isnan()), plan
        error = (got.double() - want)[ok].norm() / want[ok].norm().clamp_min(1e-12)
        assert error <= TOLERANCE[x.dtype], (plan, float(error))


# every case in float32, some of them in the others, which differ in where they round
PAIRS = [
    (c, d)
    for d in TOLERANCE
    for i, c in enumerate(CASES)
    if i < 3 or c[-1] == SCORED or d == torch.float32
]
LEARNED = [(c, d) for c, d in PAIRS if c[-1] != SCORED]


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_against_the_reference(case, dtype):
    for rows in (1, 2, 67):
        check(make(case, rows, dtype))
    assert not K.fallbacks()


@settings(max_examples=10, deadline=None)
@given(
    d=st.integers(1, 40), experts=st.integers(1, 9), size=st.sampled_from([1, 2, 3, 8, 16, 20]),
    d_out=st.integers(1, 40), gated=st.booleans(), bias=st.booleans(), rows=st.integers(1, 70),
    tau=st.sampled_from([0.0, 0.1, 0.5, 1.0]), share=st.floats(0, 1), seed=st.integers(0, 99),
    dtype=st.sampled_from(list(TOLERANCE)), act=st.sampled_from(["relu", SCORED]),
)  # fmt: skip
def test_any_shape(d, experts, size, d_out, gated, bias, rows, tau, share, seed, dtype, act):
    case = (d, experts * size, d_out, size, gated, bias, "silu" if gated else act)
    args = make(case, rows, dtype, seed=seed, share=share)
    args[2] = torch.tensor(tau)
    check(args)


@pytest.mark.parametrize("rows", [4, 90])
def test_all_to_one_and_empty_experts(rows):
    args = make(CASES[2], rows)
    args[1] = torch.zeros(rows, 4)
    args[1][:, 2] = 1
    check(args)


@pytest.mark.parametrize("rows", [3, 30])
@pytest.mark.parametrize("what", [0, 1, "zero scores"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [CASES[2], CASES[-2]])
def test_values_that_are_not_finite(rows, what, value, case):
    args = make(case, rows)
    if what == "zero scores":
        args[1][1] = 0
    else:
        args[what] = args[what].clone()
        args[what][1, 1] = value
    check(args)


def test_the_entry_point():
    args = make(CASES[2], 6)
    want = reference(*args)
    assert torch.allclose(K.dynk_ffn_cuda(*args), want, atol=1e-5)
    deep = [args[0].view(2, 3, 40), args[1].view(2, 3, 4), *args[2:]]
    assert K.dynk_ffn_cuda(*deep).shape == (2, 3, 104)
    turned = [args[0].T.contiguous().T, *args[1:]]
    assert torch.allclose(K.dynk_ffn_cuda(*turned), want, atol=1e-5)
    none = [args[0][:0], args[1][:0], *args[2:]]
    assert K.dynk_ffn_cuda(*none).shape == (0, 104)
    broad = [args[0], args[1][:1], *args[2:]]
    with pytest.warns(UserWarning, match="do not fit"):
        assert torch.equal(K.dynk_ffn_cuda(*broad), reference(*broad))
    double = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    with pytest.warns(UserWarning, match="plain reference: dtype torch.float64"):
        K.dynk_ffn_cuda(*double)
    torch.use_deterministic_algorithms(True)
    assert torch.allclose(K.dynk_ffn_cuda(*args), want, atol=1e-5)
    torch.use_deterministic_algorithms(False)
    K._fallbacks.clear()


def routed(args, width, seed):
    """A router for the rows of a call, and its scores in double, rounded as kernels round."""
    x, scores = args[:2]
    g = torch.Generator().manual_seed(seed)
    down, up = (
        (torch.randn(*shape, generator=g) * shape[-1] ** -0.5).to(x.dtype)
        for shape in ((width, x.shape[1]), (scores.shape[1], width))
    )
    h = torch.relu(x.double() @ down.double().T).to(x.dtype).double()
    return (down, up), (h @ up.double().T).abs()


ROUTED = dict(
    d=st.integers(1, 80), experts=st.integers(1, 40), size=st.sampled_from([1, 2, 5, 16]),
    width=st.integers(1, 70), gated=st.booleans(), tau=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    seed=st.integers(0, 99), dtype=st.sampled_from(list(TOLERANCE)), broken=st.booleans(),
)  # fmt: skip


def routed_call(d, experts, size, width, gated, tau, seed, dtype, broken, rows):
    case = (d, experts * size, 9, size, gated, True, "silu" if gated else "relu")
    args = make(case, rows, dtype, seed=seed)
    args[2] = torch.tensor(tau)
    if broken:
        args[0][rows // 2, 0] = float("nan")
    # only in IEEE arithmetic, which the interpreter has anyway, are routers left to PyTorch
    spec = K._prepare(args[0], args[1], tuple(args[3:9]), *args[9:], "tf32x3")
    return args, spec, *routed(args, width, seed)


def check_routed(spec, plan, args, router, mask):
    """A call that scores itself, against the reference with what it was seen to select."""
    got = run(spec, plan, args[0], router, *args[2:9])
    chosen = [args[0].double(), mask.double(), torch.tensor(0.5)]
    more = [t.double() if isinstance(t, torch.Tensor) else t for t in args[3:]]
    want = reference(*chosen, *more)
    assert torch.equal(got.isnan(), want.isnan())
    ok = want.isfinite()
    error = (got.double() - want)[ok].norm() / want[ok].norm().clamp_min(1e-12)
    assert error <= TOLERANCE[got.dtype], (plan, float(error))


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 16), **ROUTED)
def test_a_router_of_few_rows(rows, **options):
    args, spec, router, want = routed_call(rows=rows, **options)
    launch = Launch(spec, default_tiles(spec, "few", rows), torch.device("cpu"))
    scores, limits, active, total = launch.score(args[0], router, args[2], rows)
    assert torch.equal(scores.isnan(), want.isnan())
    ok = want.isfinite()
    worst = 2 * TOLERANCE[scores.dtype] * want[ok].norm().clamp_min(1e-3)
    assert (scores.double() - want)[ok].norm() <= worst
    mask = select(scores, args[2])
    assert active[: int(total)].tolist() == mask.any(0).nonzero().flatten().tolist()
    assert torch.equal(mask, ~(scores.float() < limits[:, None]))
    check_routed(spec, "few", args, router, mask)


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 150), **ROUTED)
@example(rows=129, d=1, experts=5, size=1, width=1, gated=False, tau=0.0, seed=0,
         dtype=torch.bfloat16, broken=True)  # fmt: skip
def test_a_router_of_many_rows(rows, **options):
    args, spec, router, want = routed_call(rows=rows, **options)
    launch = Launch(spec, default_tiles(spec, "lists", rows), torch.device("cpu"))
    lists = launch.lists(args[0], router, args[2], rows, rests=True)
    counts = lists.counts.view(2, -1, spec.experts)
    found = torch.zeros(2, rows, spec.experts, dtype=torch.long)
    for entry in range(lists.entries):
        span, expert = divmod(entry, spec.experts)
        held = lists.rows.view(-1, lists.span)[entry].long()
        found[0, held[: counts[0, span, expert]], expert] += 1
        found[1, held.flip(0)[: counts[1, span, expert]], expert] += 1
    assert (found.sum(0) == 1).all()  # a row is in one of the two lists of an expert, once
    mask, limit = found[0] > 0, args[2].double() * want.amax(-1, keepdim=True)
    clear = (want - limit).abs() > 0.03 * want.amax(-1, keepdim=True)  # of rounding
    assert torch.equal(mask[clear], (want >= limit)[clear])
    assert mask[want.isnan().any(-1)].all()
    for plan in ("lists", "pairs"):
        check_routed(spec, plan, args, router, mask)


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_the_first_call_after_tuning(rows, monkeypatch):
    """Without a card only the clock is not real: every option runs, and leaves nothing behind."""
    ran = []

    def clock(call, **_):
        ran.append(call())
        return -len(ran)  # the last option, which is no default, is the fastest

    monkeypatch.setattr("triton.testing.do_bench", clock)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr(tuned, "_found", {})
    args = make(CASES[2], rows)
    spec = K.prepare(args[0], args[1], tuple(args[3:9]), args[9], args[10])
    best = tune(spec, *args[:9], write=False)[0]
    assert len(ran) > 3
    assert K.plan_of(spec, args[0]) == best[1:]
    want = reference(*args)
    for found in (K.dynk_ffn_cuda(*args), K.dynk_ffn_cuda(*args), *ran):
        assert torch.allclose(found, want, atol=1e-4)
    tuned.forget()
    assert K.plan_of(spec, args[0])[1] is None


def check_gradients(args):
    spec = K._prepare(args[0], args[1], tuple(args[3:9]), args[9], args[10], "ieee")
    assert isinstance(spec, TritonSpec), spec
    live = [t.double().requires_grad_() if t is not None and i not in (1, 2) else t
            for i, t in enumerate(args[:9])]  # fmt: skip
    y = reference(*live, *args[9:])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(args[0].dtype)
    given = [t for i, t in enumerate(live) if t is not None and i not in (1, 2)]
    wanted = torch.autograd.grad(y, given, grad.double())
    got = gradients(spec, grad, *args[:9])
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == args[0].dtype
        worst = (a.double() - b).norm() / b.norm().clamp_min(1e-12)
        assert worst <= 3 * TOLERANCE[a.dtype], float(worst)


@pytest.mark.parametrize(("case", "dtype"), LEARNED)
def test_gradients_against_autograd_of_the_reference(case, dtype):
    for rows in (1, 37) if dtype == torch.float32 else (37,):
        check_gradients(make(case, rows, dtype))


@pytest.mark.parametrize("rows", [1, 90])
def test_gradients_of_all_to_one_and_empty_experts(rows):
    args = make(CASES[2], rows)
    args[1] = torch.zeros(rows, 4)
    args[1][:, 2] = 1
    check_gradients(args)
    spec = K._prepare(args[0], args[1], tuple(args[3:9]), args[9], args[10], "ieee")
    into = gradients(spec, torch.ones(rows, 104), *args[:9])[1]
    assert (into[:16] == 0).all()
    assert (into[24:] == 0).all()


@pytest.mark.parametrize("rows", [0, 7])
def test_gradients_that_are_wanted(rows):
    args = make(CASES[3], rows)
    grad = torch.randn(rows, args[7].shape[1])
    for wanted in ([1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 1, 0, 1], [0] * 8 + [1]):
        given = (grad, args[:9], *args[9:], [bool(w) for w in wanted])
        got, want = differentiate(*given), reference_backward(*given)
        assert len(got) == len(want) == sum(wanted)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    torch.use_deterministic_algorithms(True)
    assert differentiate(grad, args[:9], *args[9:], [True] + [False] * 8) is None
    torch.use_deterministic_algorithms(False)


def test_gradients_where_scores_weight_experts_are_the_references():
    args = make(CASES[-2], 7)
    wanted = [t is not None and i != 2 for i, t in enumerate(args[:9])]
    assert differentiate(torch.randn(7, 104), args[:9], *args[9:], wanted) is None


def test_opcheck_of_backward():
    args = make(CASES[2], 5)
    wanted = [True, False, False, True, True, False, False, True, True]
    given = (torch.randn(5, 104), *args, wanted)
    torch.library.opcheck(torch.ops.skimp.dynk_ffn_backward.default, given)
