"""The op against a brute-force loop over rows and experts, and its policies on odd input."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimp.ir import ACTIVATIONS, DynkFFN, dynk_ffn, select
from skimp.ir.errors import BadWeightsError
from skimp.ir.op import SCORED


def make(rows, d, e, n, d_out, *, gated=False, bias=True, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    f = e * n
    return dict(
        x=r(rows, d),
        scores=r(rows, n).abs(),
        tau=torch.tensor(0.3, dtype=dtype),
        w_in=r(f, d),
        b_in=r(f) if bias else None,
        w_gate=r(f, d) if gated else None,
        b_gate=r(f) if gated and bias else None,
        w_out=r(f, d_out),
        b_out=r(d_out) if bias else None,
        expert_size=e,
        act="relu",
    )


def brute(x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out, expert_size, act):
    rows = []
    for t in range(x.shape[0]):
        y = torch.zeros(w_out.shape[1], dtype=x.dtype)
        for i in range(scores.shape[1]):
            if act == SCORED:
                if scores[t, i].abs() < tau:
                    continue
            elif scores[t, i] < tau * scores[t].max():
                continue
            s = slice(i * expert_size, (i + 1) * expert_size)
            up = w_in[s] @ x[t] + (0 if b_in is None else b_in[s])
            if act == SCORED:
                h = scores[t, i] * up
            elif w_gate is None:
                h = ACTIVATIONS[act](up)
            else:
                h = ACTIVATIONS[act](w_gate[s] @ x[t] + (0 if b_gate is None else b_gate[s])) * up
            y = y + h @ w_out[s]
        rows.append(y if b_out is None else y + b_out)
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    d=st.integers(1, 9),
    e=st.integers(1, 5),
    n=st.integers(1, 6),
    d_out=st.integers(1, 7),
    gated=st.booleans(),
    bias=st.booleans(),
    tau=st.floats(0, 1),
    act=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_op_is_the_sum_of_selected_experts(rows, d, e, n, d_out, gated, bias, tau, act):
    a = make(rows, d, e, n, d_out, gated=gated, bias=bias)
    a |= dict(tau=torch.tensor(tau, dtype=torch.float64), act=act)
    torch.testing.assert_close(dynk_ffn(**a), brute(**a))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 6),
    e=st.integers(1, 3),
    n=st.integers(1, 6),
    bias=st.booleans(),
    tau=st.floats(0, 2),
)
def test_experts_weighted_by_their_scores(rows, e, n, bias, tau):
    a = make(rows, 5, e, n, 4, bias=bias)
    a["scores"] *= torch.where(a["x"][:, :1] < 0, -1, 1)
    a |= dict(tau=torch.tensor(tau, dtype=torch.float64), act=SCORED)
    torch.testing.assert_close(dynk_ffn(**a), brute(**a))


def test_scores_that_weight_experts_have_a_gradient():
    a = make(4, 5, 2, 6, 5) | dict(act=SCORED)
    names = ["x", "scores", "w_in", "b_in", "w_out", "b_out"]
    for name in names:
        a[name].requires_grad_()

    def f(*leaves):
        return dynk_ffn(**(a | dict(zip(names, leaves, strict=True))))

    assert torch.autograd.gradcheck(f, [a[n] for n in names])
    dynk_ffn(**a).sum().backward()
    rests = a["scores"] < a["tau"]
    assert rests.any()
    assert (a["scores"].grad[rests] == 0).all()
    assert (a["scores"].grad[~rests] != 0).all()


def test_what_a_weighted_row_has_not_it_does_not_run():
    s = torch.tensor([[0.0, -2.0, 1.0], [0.0, 0.0, 0.0], [0.0, float("nan"), 0.0]])
    chosen = select(s, torch.tensor(1.5), SCORED)
    assert chosen.tolist() == [[False, True, False], [False] * 3, [False, True, False]]
    assert select(s, torch.tensor(0.0), SCORED).all()
    a = make(1, 4, 1, 3, 4) | dict(act=SCORED, scores=torch.zeros(1, 3, dtype=torch.float64))
    assert torch.equal(dynk_ffn(**a)[0], a["b_out"])


def test_tau_zero_is_dense_and_tau_one_is_the_best_expert():
    s = torch.rand(50, 7)
    assert select(s, torch.tensor(0.0)).all()
    one = select(s, torch.tensor(1.0))
    assert (one.sum(-1) == 1).all()
    assert (one.int().argmax(-1) == s.argmax(-1)).all()


def test_more_experts_run_as_tau_falls_and_scale_does_not_matter():
    s = torch.rand(50, 7)
    counts = [select(s, torch.tensor(t)).sum(-1) for t in (1.0, 0.7, 0.4, 0.1, 0.0)]
    assert all((a <= b).all() for a, b in itertools.pairwise(counts))
    assert torch.equal(select(s, torch.tensor(0.5)), select(s * 8, torch.tensor(0.5)))


def test_the_threshold_is_not_rounded():
    # 0.305 rounds to 0.3046875 in bfloat16, which the second score would tie with
    scores = torch.tensor([[1.0, 0.3046875]], dtype=torch.bfloat16)
    tau = torch.tensor(0.305)
    assert select(scores, tau).tolist() == [[True, False]]
    assert torch.compile(select)(scores, tau).tolist() == [[True, False]]


def test_row_without_evidence_runs_everything():
    s = torch.zeros(2, 4)
    s[1, 2] = float("nan")
    assert select(s, torch.tensor(0.5)).all()


def test_nan_reaches_the_output_of_its_row_only():
    a = make(3, 5, 2, 4, 5)
    a["x"][1, 0] = float("nan")
    a["scores"][1] = float("nan")
    y = dynk_ffn(**a)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_infinity_in_a_skipped_expert_stays_there():
    a = make(1, 5, 2, 4, 5)
    a["scores"] = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    a["b_in"][6] = float("inf")
    assert dynk_ffn(**a).isfinite().all()


def test_gradients_flow_through_selected_experts_only():
    a = make(4, 5, 2, 6, 5, gated=True)
    names = ["x", "w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out"]
    for name in names:
        a[name].requires_grad_()

    def f(*leaves):
        return dynk_ffn(**(a | dict(zip(names, leaves, strict=True))))

    assert torch.autograd.gradcheck(f, [a[n] for n in names])
    a["scores"] = torch.eye(6, dtype=torch.float64)[:1].repeat(4, 1)
    dynk_ffn(**a).sum().backward()
    assert (a["w_in"].grad[:2] != 0).any()
    assert (a["w_in"].grad[2:] == 0).all()


@pytest.mark.parametrize(("gated", "act"), [(False, "relu"), (True, "relu"), (False, SCORED)])
def test_opcheck(gated, act):
    a = make(4, 5, 2, 6, 3, gated=gated, dtype=torch.float32) | dict(act=act)
    torch.library.opcheck(dynk_ffn, tuple(a.values()))
    a["x"] = torch.randn(5, 4).t()  # strides that are not contiguous
    torch.library.opcheck(dynk_ffn, tuple(a.values()))


def test_block_runs_under_fullgraph_and_keeps_its_leading_shape():
    a = make(1, 16, 4, 8, 16, dtype=torch.float32)
    block = DynkFFN(
        *(a[k] for k in ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")),
        expert_size=4, act="relu", router_width=8, tau=0.2,
    )  # fmt: skip
    x = torch.randn(2, 3, 16)
    dense = torch.relu(x @ block.w_in.T + block.b_in) @ block.w_out + block.b_out
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))
    block.tau.zero_()  # the knob turns without compiling again
    torch.testing.assert_close(compiled(x), dense)


def test_block_refuses_what_it_cannot_be():
    w = torch.randn(12, 4)
    kw = dict(expert_size=4, act="relu", router_width=2)
    with pytest.raises(BadWeightsError, match="does not divide d_ff 12; choose a divisor"):
        DynkFFN(w, None, None, None, w, None, **(kw | dict(expert_size=5)))
    with pytest.raises(BadWeightsError, match=r"b_in has shape \(3,\), expected \(12,\)"):
        DynkFFN(w, torch.zeros(3), None, None, w, None, **kw)
    for gate, size in ((None, 1), (w, 4)):
        with pytest.raises(BadWeightsError, match="only a gated network has a gate"):
            DynkFFN(w, None, gate, None, w, None, expert_size=size, act="relu", router_width=0)
    both = make(2, 5, 2, 6, 3, gated=True) | dict(act=SCORED)
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in both.items()}
    with pytest.raises(ValueError, match="act is 'scored'"):
        dynk_ffn(**meta)
    bad = w.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(BadWeightsError, match="w_in holds NaN"):
        DynkFFN(bad, None, None, None, w, None, **kw)
