"""Lowering inside torch.compile, on graphs of CUDA tensors that exist in name only."""

import contextlib
import types
from unittest.mock import patch

import pytest
import sympy
import torch
from skimp.codegen.triton import tuned
from skimp.codegen.triton.spec import FEW_ROWS, Tiles, TritonSpec
from skimp.ir import dynk_ffn
from skimp.ir.op import _backward
from skimp.runtime import backend
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.custom_graph_pass import get_custom_graph_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu.py runs it")

HOP = torch.ops.higher_order.triton_kernel_wrapper_mutation
H100 = types.SimpleNamespace(
    multi_processor_count=132, major=9, minor=0, regs_per_multiprocessor=65536, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, name="H100",
    shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, total_memory=80 << 30,
)  # fmt: skip


@pytest.fixture(autouse=True)
def named_card():
    """PyTorch asks what card there is, and for which Triton compiles; nothing is run on it."""
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = types.SimpleNamespace(get_current_target=lambda: target)
    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (CudaInterface, "get_device_properties", lambda d=None: H100),
            (CudaInterface, "get_compute_capability", lambda d=None: 90),
            (CudaInterface.Worker, "get_device_properties", lambda d=None: H100),
        ):
            stack.enter_context(patch.object(where, name, staticmethod(value)))
        stack.enter_context(patch("torch.cuda.get_device_properties", lambda d=None: H100))
        stack.enter_context(patch("torch._inductor.scheduler.has_triton", lambda *a: True))
        stack.enter_context(config.patch(compile_threads=1))  # no pool of workers
        stack.enter_context(patch.object(triton.runtime.driver, "_active", driver))
        yield


class Captured:
    """A graph of the op between two elementwise operations, as Inductor gets it."""

    def __init__(self, rows, e=128, d=64, d_ff=256, gated=False, dtype=torch.bfloat16,
                 device="cuda", symbolic=False, routed=False):  # fmt: skip
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, static_shapes=not symbolic)

        def fake(*shape, symbols=False):
            real = torch.empty(*shape, dtype=dtype, device="meta")
            made = self.mode.from_tensor(real, static_shapes=not symbols)
            with self.mode:
                return torch.empty(made.shape, dtype=dtype, device=device)

        with self.mode:
            tau = torch.empty((), device=device)
        x = fake(rows, d, symbols=symbolic)
        if symbolic:  # one symbol, of the rows
            n = x.shape[0]
            with self.mode:
                x = torch.empty(n, d, dtype=dtype, device=device)
                scores = torch.empty(n, d_ff // e, dtype=dtype, device=device)
        else:
            scores = fake(32, d) if routed else fake(rows, d_ff // e)
        gate = [fake(d_ff, d)] if gated else []
        up = [fake(d_ff // e, 32)] if routed else []
        self.inputs = [x, scores, tau, fake(d_ff, d), *gate, fake(d_ff, d), fake(d), *up]

        def block(x, scores, tau, w_in, *more):
            x = x + 1
            if routed:
                *more, up = more
                scores = F.linear(torch.relu(F.linear(x, scores)), up).abs()
            g = more[0] if gated else None
            y = dynk_ffn(x, scores, tau, w_in, None, g, None, *more[-2:], e, "silu")
            return (torch.relu(y) * 2,)

        with self.mode:
            self.gm = make_fx(block, decomposition_table=select_decomp_table())(*self.inputs)

    def lower(self):
        passes = backend.with_lowering(cuda=True)
        context = contextlib.ExitStack()
        context.enter_context(V.set_fake_mode(self.mode))
        context.enter_context(V.set_debug_handler(DebugContext()))
        context.enter_context(config.patch({backend.LOWERING: passes}))
        with context:
            post_grad_passes(self.gm, True)
        return self

    def code(self):
        context = contextlib.ExitStack()
        context.enter_context(V.set_fake_mode(self.mode))
        context.enter_context(V.set_debug_handler(DebugContext()))
        with context:
            graph = GraphLowering(self.gm, self.inputs, shape_env=self.env, is_inference=True)
            with V.set_graph_handler(graph):
                graph.run(*self.inputs)
                return graph.codegen()[0].value

    @property
    def targets(self):
        return [n.target for n in self.gm.graph.nodes if n.op == "call_function"]

    @property
    def launched(self):
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        found = [n.kwargs["kernel_idx"] for n in self.gm.graph.nodes if n.target is HOP]
        kernels = [kernel_side_table.get_kernel(i) for i in found]
        return [getattr(k, "fn", k).__name__ if hasattr(k, "configs") else k.__name__
                for k in kernels]  # fmt: skip


OP = torch.ops.skimp.dynk_ffn.default
CASES = {
    "few": (dict(rows=8), ["few"]),
    "one": (dict(rows=1, gated=True), ["few"]),
    "lists": (dict(rows=16384), ["route", "number", "lists_hidden"]),
    "masked": (dict(rows=4096, e=8), []),
}


@pytest.mark.parametrize("name", CASES)
def test_the_op_becomes_its_kernels(name):
    options, kernels = CASES[name]
    captured = Captured(**options)
    assert OP in captured.targets
    captured.lower()
    assert OP not in captured.targets
    assert captured.launched == kernels
    # every buffer is written where it lies: functionalising them cost no copy
    assert not kernels or torch.ops.aten.clone.default not in captured.targets


@pytest.mark.parametrize(
    ("rows", "launched"),
    [(1, ["few"]), (16, ["few"]), (17, []),
     (16384, ["score_route", "number", "lists_hidden"])],
)  # fmt: skip
def test_kernels_take_the_router_over(rows, launched):
    captured = Captured(rows=rows, routed=True).lower()
    assert OP not in captured.targets
    assert captured.launched == launched
    taken = launched[:1] == ["score_route"]
    assert (torch.ops.aten.abs.default in captured.targets) is not taken
    if taken:
        assert torch.ops.aten.addmm.default in captured.targets  # the second product is PyTorch's
        assert torch.ops.aten.mm.default not in captured.targets
        assert f"async_compile.triton('{launched[0]}" in captured.code()


def test_a_router_too_large_for_a_kernel_stays():
    captured = Captured(rows=16384, routed=True, d_ff=512 * 64, e=64).lower()
    assert captured.launched == ["route", "number", "lists_hidden"]
    assert torch.ops.aten.abs.default in captured.targets


def test_products_that_sum_on_chip():
    with patch("skimp.codegen.triton.kernels._precision", ["tf32x3"]):
        captured = Captured(rows=16384, dtype=torch.float32).lower()
    assert captured.launched == ["route", "number", "pairs"]
    assert torch.ops.aten.mm.default not in captured.targets


def test_inductor_fuses_around_the_kernels():
    code = Captured(rows=8).lower().code()
    assert "async_compile.triton('few" in code
    assert "skimp" not in code.split("def call(")[1]  # no opaque call, hence no Python, is left
    # sums, bias, cast, relu and the product by two are one kernel, after `few`
    assert code.count("async_compile.triton('triton_poi") <= 3
    last = code.split("async_compile.triton('triton_poi")[-1]
    assert "relu" in last or "maximum" in last
    code = Captured(rows=4096, e=8).lower().code()  # masked: Inductor's own kernels only
    assert "few" not in code
    assert "skimp" not in code.split("def call(")[1]


@pytest.mark.parametrize(
    ("rows", "inside", "outside"),
    [(8, (2, 9, FEW_ROWS), (17, 4096)), (200, (17, 65, 4096, 9999), (3, 16, 20000)),
     (20000, (16384, 40000, 1 << 20), (16, 200))],
)  # fmt: skip
def test_rows_of_a_class_share_a_graph(rows, inside, outside):
    captured = Captured(rows=rows, symbolic=True).lower()
    assert OP not in captured.targets
    symbol = captured.inputs[0].shape[0].node.expr
    holds = sympy.And(*(g.expr for g in captured.env.guards))
    assert all(holds.subs(symbol, n) == sympy.true for n in inside)
    assert all(holds.subs(symbol, n) == sympy.false for n in outside)
    assert captured.code()


def test_other_devices_and_misfits_are_left_alone():
    assert OP in Captured(rows=8, dtype=torch.float64).lower().targets
    elsewhere = Captured(rows=8, device="cpu").lower()
    assert torch.ops.skimp_cpu.dynk_ffn.default in elsewhere.targets
    assert not elsewhere.launched


def test_training_differentiates_through_the_experts_that_ran():
    captured = Captured(rows=64, gated=True)
    x, scores, tau, w_in, w_gate, w_out, b_out = captured.inputs

    saved = (x, scores, tau, w_in, None, w_gate, None, w_out, b_out)
    needs = [i not in (1, 2, 4, 6) for i in range(9)]

    def backward(*saved):  # autograd's engine cannot be asked: it wants the card itself
        context = types.SimpleNamespace(
            saved_tensors=saved, needs_input_grad=needs, static=(128, "silu")
        )
        return _backward(context, saved[0] * 2)

    with captured.mode:
        gm = make_fx(backward)(*saved)
    got = [None if n is None else n.meta["val"].shape for n in gm.graph.output_node().args[0]]
    shapes = [t.shape if need else None for t, need in zip(saved, needs, strict=True)]
    assert got == [*shapes, None, None]
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.skimp.dynk_ffn_backward.default) == 1
    assert torch.ops.aten.mm.default not in targets


def test_one_pass_lowers_for_both_devices_beside_the_users():
    asked = []
    gm = Captured(rows=2).gm
    with patch("torch._inductor.compile_fx.compile_fx", lambda g, i, config_patches: asked.append(
        get_custom_graph_passes(config_patches[backend.LOWERING]))):  # fmt: skip
        backend.skimp(gm, [torch.randn(2)])
        backend.skimp(gm, Captured(rows=2).inputs)
        backend.skimp(gm, Captured(rows=2).inputs, options={backend.LOWERING: print})
    assert [len(passes) for passes in asked] == [1, 1, 2]
    assert asked[2][0] is print
    (cpu,), (both,) = asked[:2]
    assert set(cpu.uuid()) < set(both.uuid())


def test_its_identity_changes_with_what_the_kernels_depend_on():
    lowering = backend.with_lowering(cuda=True)[-1]
    first = lowering.uuid()
    assert first == backend.with_lowering(cuda=True)[-1].uuid()
    with patch("skimp.codegen.triton.kernels._precision", ["tf32x3"]):
        assert lowering.uuid() != first
    spec = TritonSpec("relu", False, False, False, False, 8, 64, 64, 64, "bfloat16")
    held = dict(tuned._found)
    try:
        tuned.remember(spec, "64", torch.device("cuda"), "lists", Tiles(64, 64, 32, 32, 4, 2),
                       write=False)  # fmt: skip
        assert lowering.uuid() != first
    finally:
        tuned._found.clear()
        tuned._found.update(held)
