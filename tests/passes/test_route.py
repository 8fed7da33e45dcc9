"""Routers: where they start, and what they are to learn."""

import pytest
import torch
from skimp.ir.block import DynkFFN
from skimp.passes.base import expert_norms, relative_norms
from skimp.passes.route import Route


def block(d=8, experts=16, size=4, act="relu"):
    torch.manual_seed(0)
    wide = experts * size
    w = [torch.randn(wide, d) / d**0.5 for _ in range(3)]
    gate = None if act == "relu" else w[1]
    return DynkFFN(w[0], None, gate, None, w[2], None, expert_size=size, act=act, router_width=48)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("act", ["relu", "silu"])
def test_before_any_step_a_router_knows_more_than_the_mean_norms(act, relative):
    made, x = block(act=act), torch.randn(3000, 8)
    fitted, unexplained = Route(steps=0, relative=relative)._fit((made, x, 0))
    assert unexplained < 0.7
    fresh = torch.randn(1000, 8)
    with torch.no_grad():
        norms = expert_norms(fitted, fitted.hidden(fresh))
        want = relative_norms(norms) if relative else norms
        error = (fitted.router.score(fresh) - want).square().mean() / want.var(0).mean()
    assert error < 0.75  # in the unit of the norms, too


def test_relative_norms_do_not_depend_on_how_large_a_row_is():
    made, x = block(), torch.randn(50, 8)
    with torch.no_grad():
        a, b = (relative_norms(expert_norms(made, made.hidden(v))) for v in (x, 1000 * x))
    torch.testing.assert_close(a, b)
    assert torch.equal(relative_norms(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_rows_of_zeros_fit_without_nan():
    fitted, unexplained = Route(steps=2, relative=True)._fit((block(), torch.zeros(64, 8), 0))
    assert unexplained == 0
    assert torch.isfinite(fitted.router.score(torch.randn(5, 8))).all()
