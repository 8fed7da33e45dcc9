"""Generated kernels against the reference: odd shapes, odd routing, odd values, odd machines."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimp.codegen.cpp import build as builder
from skimp.codegen.cpp import bundle
from skimp.codegen.cpp.emit import emit, head
from skimp.codegen.cpp.kernels import ARGUMENTS, dynk_ffn_cpu, fallbacks, install, kernel, ops
from skimp.codegen.cpp.spec import FLAGS, KernelSpec, LinearSpec, detect_isa
from skimp.ir import dynk_ffn, reference
from skimp.ir.errors import CompileError
from skimp.ir.op import SCORED, use_cpu_kernel

# (d, d_ff, d_out, expert size, gated, biases, act): few, since each one is a compile
CASES = [
    (13, 30, 13, 5, False, True, "gelu"),
    (16, 24, 40, 3, True, False, "silu"),
    (40, 32, 104, 8, False, True, "relu"),
    (33, 12, 7, 1, True, True, "gelu_tanh"),
    (8, 128, 8, 64, False, False, "identity"),
    (16, 24, 40, 3, True, True, "gelu_quick"),
    (40, 32, 24, 8, False, True, "relu2"),
    (40, 30, 104, 1, False, True, "scored"),
    (13, 30, 13, 5, False, False, "scored"),
]

POINTERS = ("x", "scores", "w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")


def make(case, rows, dtype=torch.float32, seed=0, share=0.5):
    d, d_ff, d_out, e, gated, bias, act = case
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    scores = torch.rand(rows, d_ff // e, generator=g)
    scores = torch.where(scores < share, scores * 0.1, scores)
    if act == SCORED:
        scores *= torch.where(torch.rand(scores.shape, generator=g) < 0.5, -1, 1)
    values = dict(
        x=r(rows, d), scores=scores, tau=torch.tensor(0.3), w_in=r(d_ff, d) / d**0.5,
        b_in=r(d_ff) if bias else None, w_gate=r(d_ff, d) / d**0.5 if gated else None,
        b_gate=r(d_ff) if gated and bias else None, w_out=r(d_ff, d_out) / d_ff**0.5,
        b_out=r(d_out) if bias else None,
    )  # fmt: skip
    cast = {k: v if v is None or k == "tau" else v.to(dtype) for k, v in values.items()}
    return cast | dict(expert_size=e, act=act)


def check(args, tolerance=1e-5):
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    if (
        args["x"].dtype == torch.bfloat16 and args["act"] != SCORED
    ):  # the selection is made in the scores' dtype
        limit = args["tau"] * args["scores"].amax(-1, keepdim=True)
        double["scores"] = (~(args["scores"] < limit)).double()
    want, got = reference(**double), dynk_ffn_cpu(*args.values())
    assert got.dtype == args["x"].dtype
    assert torch.equal(got.isnan(), want.isnan())
    ok = want.isfinite()
    assert torch.equal(got[~ok & ~want.isnan()].double(), want[~ok & ~want.isnan()])
    error = (got.double() - want)[ok].norm() / want[ok].norm().clamp_min(1e-12)
    assert error <= tolerance, float(error)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 131, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_reference(case, rows, dtype):
    check(make(case, rows, dtype), 1e-5 if dtype == torch.float32 else 2e-2)
    assert not any("dtype" not in reason for reason in fallbacks())


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    rows=st.integers(1, 40),
    tau=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_routing(case, rows, tau, share, seed):
    args = make(case, rows, seed=seed, share=share)
    args["tau"] = torch.tensor(tau)
    check(args)


@pytest.mark.parametrize("rows", [4, 40])
def test_all_to_one_and_empty_experts(rows):
    args = make(CASES[2], rows)
    args["scores"] = torch.zeros(rows, 4)
    args["scores"][:, 2] = 1
    check(args)


def test_no_rows_and_more_dimensions():
    args = make(CASES[2], 6)
    none = {k: v[:0] if k in ("x", "scores") else v for k, v in args.items()}
    assert dynk_ffn_cpu(*none.values()).shape == (0, 104)
    deep = args | {"x": args["x"].view(2, 3, 40), "scores": args["scores"].view(2, 3, 4)}
    assert torch.equal(dynk_ffn_cpu(*deep.values()).view(6, 104), dynk_ffn_cpu(*args.values()))


@pytest.mark.parametrize("case", [CASES[2], *CASES[-2:]])
@pytest.mark.parametrize("rows", [3, 30, 70])
@pytest.mark.parametrize("what", ["x", "scores", "zero scores"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(case, rows, what, value):
    args = make(case, rows)
    if what == "zero scores":
        args["scores"][1] = 0
    else:
        args[what] = args[what].clone()
        args[what][1, 1] = value
    check(args)


def test_strides_are_honoured():
    args = make(CASES[2], 20)
    args["x"] = args["x"].T.contiguous().T
    args["w_out"] = args["w_out"].T.contiguous().T
    check(args)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(make(CASES[2], 9))
        check(make(CASES[2], 300))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [5, 50])
def test_the_portable_text_computes_the_same(rows):
    args = make(CASES[1], rows)
    spec = KernelSpec("silu", True, False, False, False, 3, 16, 24, 40, "float32", "portable")
    y = torch.empty(rows, 40)
    names = ("x", "scores", "w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")
    p = [None if args[k] is None else args[k].data_ptr() for k in names]
    assert kernel(spec)(p[0], p[1], 0.3, *p[2:], y.data_ptr(), rows, 64, 2) == 0
    assert torch.allclose(y, reference(**args), atol=1e-5)


@pytest.mark.parametrize("rows", [5, 70])
def test_the_wide_text_computes_the_same(rows):
    """The text for AVX-512, whose vectors a compiler halves for machines without."""
    if detect_isa() == "portable":
        pytest.skip("the wide text folds its sums with AVX2")
    args = make(CASES[2], rows)
    spec = KernelSpec("relu", False, True, False, True, 8, 40, 32, 104, "float32", "avx512")
    run = builder.build(emit(spec), "wide", FLAGS["avx2"]).dynk_ffn
    run.argtypes = ARGUMENTS
    p = [None if args[k] is None else args[k].data_ptr() for k in POINTERS]
    y = torch.empty(rows, 104)
    assert run(p[0], p[1], 0.3, *p[2:], y.data_ptr(), rows, 64, 2) == 0
    assert torch.allclose(y, reference(**args), atol=1e-5)


@pytest.mark.parametrize("name", ["ffn", "linear"])
@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16"])
def test_the_text_for_avx512_compiles(name, isa, tmp_path):
    dtype = "bfloat16" if isa.endswith("bf16") else "float32"
    spec = replace(SPECS[name], isa=isa, dtype=dtype)
    source = tmp_path / "kernel.cpp"
    source.write_text(emit(spec))
    command = [*builder.compiler(), *builder._FLAGS, *spec.flags, "-c", str(source)]
    got = subprocess.run(
        [*command, "-o", str(tmp_path / "k.o")], capture_output=True, text=True, check=False
    )
    if "unrecognized" in got.stderr:
        pytest.skip("a compiler for another architecture")
    assert got.returncode == 0, got.stderr


def test_other_dtypes_run_the_reference_and_say_so():
    forget()  # other tests may have had their warning
    args = {
        k: v.double() if isinstance(v, torch.Tensor) else v for k, v in make(CASES[2], 3).items()
    }
    with pytest.warns(UserWarning, match="plain reference: dtype torch.float64"):
        got = dynk_ffn_cpu(*args.values())
    assert torch.equal(got, reference(**args))
    fallbacks_seen = fallbacks()
    assert fallbacks_seen["dtype torch.float64"] == 1
    forget()


@pytest.mark.parametrize("name", ["x", "scores", "w_in", "b_in", "w_out", "b_out"])
def test_shapes_that_do_not_fit_never_reach_a_kernel(name):
    args = make(CASES[2], 3)
    args[name] = args[name][..., 1:]
    with pytest.warns(UserWarning, match="do not fit"), pytest.raises((RuntimeError, ValueError)):
        dynk_ffn_cpu(*args.values())
    forget()


def test_scores_that_broadcast_run_the_reference():
    args = make(CASES[2], 3)
    args["scores"] = args["scores"][:1]
    with pytest.warns(UserWarning, match="do not fit"):
        assert torch.equal(dynk_ffn_cpu(*args.values()), reference(**args))
    forget()


def forget():
    import skimp.codegen.cpp.kernels as module

    module._fallbacks.clear()


def test_the_op_is_served_once_installed():
    args = make(CASES[2], 30)
    served = dynk_ffn(*args.values())
    assert torch.equal(served, dynk_ffn_cpu(*args.values()))
    use_cpu_kernel(None)
    try:
        assert torch.equal(dynk_ffn(*args.values()), reference(**args))
    finally:
        install()


SPECS = {
    "ffn": KernelSpec("silu", True, False, False, True, 8, 576, 1536, 576, "bfloat16", "avx2"),
    "linear": LinearSpec(384, 1536, True, "float32", "portable"),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_generated_text(name):
    path = Path(__file__).parents[1] / "golden" / "cpp" / f"{name}.expected"
    got = head(SPECS[name])
    assert emit(SPECS[name]).startswith(got)
    if os.environ.get("SKIMP_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(got)
    assert got == path.read_text()
    assert detect_isa() in FLAGS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "d_out", "bias"), [(13, 7, True), (40, 35, False)])
def test_linear(d, d_out, bias, dtype):
    for rows in (0, 1, 3, 64, 65):
        x, w = torch.randn(rows, d).to(dtype), torch.randn(d_out, d).to(dtype)
        b = torch.randn(d_out).to(dtype) if bias else None
        want = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
        got = ops().linear(x, w, b)
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(),
            want,
            rtol=1e-5 if dtype == torch.float32 else 2e-2,
            atol=1e-4 if dtype == torch.float32 else 6e-2,
        )
    torch.library.opcheck(ops().linear.default, (x[:3], w, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_share_a_call(bias, dtype):
    for rows in (0, 1, 5, 40, 65):
        x = torch.randn(rows, 24).to(dtype)
        ws = [torch.randn(19, 24).to(dtype) for _ in range(3)]
        bs = [torch.randn(19).to(dtype) for _ in range(3)] if bias else []
        found = ops().linears(x, ws, bs)
        for i, got in enumerate(found):
            assert torch.equal(got, ops().linear(x, ws[i], bs[i] if bias else None))
    torch.library.opcheck(ops().linears.default, (x[:3], ws, bs))
    with pytest.raises(RuntimeError, match="another shape"):
        ops().linears(x[:3], [*ws[:2], ws[0][:, :8]], bs)


SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIMP_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def test_a_library_is_compiled_once(cache, monkeypatch):
    assert builder.build(SOURCE, "a").answer() == 42
    monkeypatch.setattr(builder, "_compile", lambda *_: pytest.fail("compiled again"))
    assert builder.build(SOURCE, "a").answer() == 42


def test_a_library_calls_its_own_functions_though_all_see_another(cache):
    text = 'extern "C" int of_two() {{ return {0}; }} extern "C" int asked() {{ return of_two(); }}'
    first = builder.build(text.format(1), "first")
    bundle._make_global(first._name)
    assert builder.build(text.format(2), "second").asked() == 2
    assert first.asked() == 1


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1]])
def test_a_damaged_library_is_compiled_again(cache, damage):
    builder.build(SOURCE, "a")
    path = next(cache.glob("a-*.so"))
    whole = path.read_bytes()
    path.unlink()  # it is mapped into this process
    path.write_bytes(damage(whole))
    assert builder.build(SOURCE, "a").answer() == 42
    assert builder._intact(path)


def test_two_processes_at_once(tmp_path):
    code = f"from skimp.codegen.cpp.build import build; print(build({SOURCE!r}, 'a').answer())"
    environment = os.environ | {"SKIMP_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    workers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [w.communicate(timeout=120)[0].strip() for w in workers] == ["42", "42"]
    assert [p.suffix for p in (tmp_path / "kernels").iterdir()] == [".so"]


def test_a_killed_compile_leaves_nothing_that_is_loaded(cache, tmp_path):
    code = f"""
        import os, signal, subprocess
        from skimp.codegen.cpp import build
        real = subprocess.run
        def run(command, **more):
            got = real(command, **more)
            if "-o" in command: os.kill(os.getpid(), signal.SIGKILL)
            return got
        build.subprocess.run = run
        build.build({SOURCE!r}, "a")
    """
    got = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert got.returncode == -signal.SIGKILL
    left = list(cache.iterdir())
    assert left
    assert not list(cache.glob("*.so"))
    os.utime(left[0], (0, 0))
    assert builder.build(SOURCE, "a").answer() == 42
    assert [p.suffix for p in cache.iterdir()] == [".so"]  # and what it left was swept away


def test_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompileError, match="no C\\+\\+ compiler: no-such-compiler"):
        builder.build(SOURCE, "a")


def test_a_failed_compile_shows_the_first_error(cache):
    with pytest.raises(CompileError, match="expected"):
        builder.build("int x = ;", "a")


def test_a_full_disk(cache):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(CompileError, match="space"):
            builder.build(SOURCE, "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(cache.glob("*.so"))
    assert builder.build(SOURCE, "a").answer() == 42
