"""Inside ``torch.compile``: on CUDA, replace the opaque op by the kernels that it would launch.

``skimp::dynk_ffn`` stays one node until Inductor's post-grad passes. There this pass puts in its
place what ``skimp::dynk_ffn_triton`` decomposes into: launches that Inductor compiles with its own
kernels, buffers that it plans, and ordinary products, sums and casts that it fuses with their
neighbours. Rows of one class share a graph: 1, up to :data:`skimp.codegen.triton.spec.FEW_ROWS`,
more, and (small experts apart) the many that fill lists. tau stays a tensor. Nodes on other devices
are left as they are, and so is a node that no kernel fits, which then runs, and warns, as in eager.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import (
    CallFunctionVarArgs,
    Match,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph, Node

from ..match import router
from . import tuned
from .kernels import followed_precision, plan_of, prepare
from .launch import run
from .spec import TritonSpec, scores_fit


@torch.library.triton_op("skimp::dynk_ffn_triton", mutates_args=())
def dynk_ffn_triton(
    x: Tensor,
    scores: Tensor,
    tau: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    expert_size: int,
    act: str,
) -> Tensor:
    """The op as kernels that a tracer can see; arguments as in :func:`skimp.ir.reference`."""
    weights = (w_in, b_in, w_gate, b_gate, w_out, b_out)
    spec = prepare(x, scores, weights, expert_size, act)
    assert isinstance(spec, TritonSpec), spec
    plan, tiles = plan_of(spec, x)
    return run(spec, plan, x, scores, tau, *weights, tiles=tiles, traced=True)


@torch.library.triton_op("skimp::routed_ffn_triton", mutates_args=())
def routed_ffn_triton(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    tau: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    expert_size: int,
    act: str,
) -> Tensor:
    """The op on the scores of a router, ``abs(relu(x down^T) up^T)``, which a kernel computes.

    Arguments as in :func:`skimp.ir.reference`; ``down`` is ``[width, d]``, ``up`` ``[E, width]``.
    """
    weights = (w_in, b_in, w_gate, b_gate, w_out, b_out)
    shape = (*x.shape[:-1], up.shape[0])
    spec = prepare(x, x.new_empty(shape), weights, expert_size, act)
    assert isinstance(spec, TritonSpec), spec
    plan, tiles = plan_of(spec, x)
    return run(spec, plan, x, (down, up), tau, *weights, tiles=tiles, traced=True)


class Lowering(CustomGraphPass):
    """The post-grad pass. Its identity holds all that the kernels it chooses depend on."""

    def __init__(self) -> None:
        self.lowered = 0
        self._rules = PatternMatcherPass(pass_name="skimp-lower")
        register_graph_pattern(
            CallFunctionVarArgs(torch.ops.skimp.dynk_ffn.default),
            extra_check=_fits,
            pass_dict=self._rules,
        )(self._replace)

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph in place."""
        self._rules.apply(graph)
        graph.eliminate_dead_code()  # routers that are part of a call now

    def uuid(self) -> Any:
        """Text of the generator, arithmetic, and what tuning found: a change of any recompiles."""
        here = Path(__file__).parent
        files = sorted(
            str(p) for p in (*here.glob("*.py"), here.parent / "spec.py", here.parent / "match.py")
        )
        return get_hash_for_files(tuple(files), json.dumps([followed_precision(), tuned.state()]))

    def _replace(self, match: Match, *args: Any) -> None:
        self.lowered += 1
        x, _, *others = args
        weights = _routed(*args)
        op = torch.ops.skimp
        match.replace_by_example(
            dispatch_functionalize(
                (op.routed_ffn_triton if weights else op.dynk_ffn_triton).default
            ),
            (x, *weights, *others) if weights else args,
            run_functional_passes=False,
        )


def _routed(x: Node, scores: Node, tau: Node, *others: Any) -> tuple[Node, Node] | None:
    """The weights of the router, if the kernels that a call will launch can take it over."""
    found = router(scores, x)
    if found is None:
        return None
    rows, *given = (a.meta["val"] if isinstance(a, Node) else a for a in (x, scores, *others))
    same = all(w.meta["val"].dtype is rows.dtype for w in (*found, scores))
    if not same or math.prod(rows.shape[:-1]) == 0:
        return None
    spec = prepare(rows, given[0], tuple(given[1:7]), *given[7:])
    assert isinstance(spec, TritonSpec), spec  # _fits asked
    plan, width = plan_of(spec, rows)[0], found[0].meta["val"].shape[0]
    # of few rows Inductor's own products and the scan beside them took less time on H200
    return found if plan != "few" and scores_fit(spec, plan, width) else None


def _fits(match: Match) -> bool:
    """Whether a node runs on CUDA and a kernel fits its arguments."""
    values: list[Any] = [a.meta["val"] if isinstance(a, Node) else a for a in match.nodes[0].args]
    x, scores, _, *weights, expert_size, act = values
    if x.device.type != "cuda":
        return False
    return isinstance(prepare(x, scores, tuple(weights), expert_size, act), TritonSpec)
