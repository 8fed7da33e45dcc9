"""Run by test_triton.py in a process where Triton interprets: kernels launched from a bundle.

The bundle is a real one, and so is everything up to the driver's interface. Behind that is a small
C library, which reads arguments as a driver does, and lets the interpreter run the kernel that the
manifest names on the memory that the parameters point to.
"""

import ctypes
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from skimp.codegen.triton import kernels as K
from skimp.codegen.triton import launch
from skimp.codegen.triton.backward import gradients
from skimp.codegen.triton.bundle import read
from skimp.codegen.triton.driver import Loaded, serve
from skimp.codegen.triton.emit import emit, emit_grads
from skimp.codegen.triton.load import load
from skimp.codegen.triton.spec import Tiles, TritonSpec
from skimp.ir import reference
from skimp.ir.errors import CompileError

BUNDLE = Path(os.environ["SKIMP_TEST_BUNDLE"])
WIDTH = int(os.environ["SKIMP_TEST_WIDTH"])
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p)
)
DTYPES = {"*fp32": torch.float32, "*i32": torch.int32}

# As cuda.h declares them; 1, 101, 200 and 500 are its errors for a value, a device, an image and a
# name that are not valid.
SOURCE = """
#include <cstring>
#include <vector>
typedef int (*Launch)(int, unsigned*, void**);
static int major_, minor_;
static Launch launch_;
static std::vector<int> shared_;
extern "C" {
void fake(int major, int minor, Launch launch) {
    major_ = major, minor_ = minor, launch_ = launch, shared_.clear();
}
int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 40 + ordinal; return ordinal ? 101 : 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (device != 40) return 101;
    *value = attribute == 75 ? major_ : attribute == 76 ? minor_ : -1;
    return 0;
}
int cuModuleLoadData(void** module, const void* image) {
    if (std::memcmp(image, "\\x7f" "ELF", 4)) return 200;
    *module = const_cast<void*>(image);
    return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    if (std::memcmp(module, "\\x7f" "ELF", 4) || !*name) return 500;
    shared_.push_back(48 << 10);
    *function = reinterpret_cast<void*>(shared_.size());
    return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8) return 1;
    shared_[reinterpret_cast<size_t>(function) - 1] = value;
    return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** params, void** extra) {
    size_t at = reinterpret_cast<size_t>(function) - 1;
    if (stream || extra || at >= shared_.size() || int(shared) > shared_[at]) return 1;
    unsigned sizes[] = {gx, gy, gz, bx, by, bz, shared};
    return launch_(int(at), sizes, params);
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "cuda.cpp").write_text(SOURCE)
    command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-o", "libcuda.so", "cuda.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "libcuda.so"))


class Card:
    """What the library tells of a launch, run by the interpreter."""

    def __init__(self, library, bundle, capability=(8, 0)):
        self.entries, self.launched, self.failure = bundle.manifest["kernels"], [], None
        specs = {n: TritonSpec(**s) for n, s in bundle.manifest["specs"].items()}
        self.modules = {n: (load(emit(s), "k"), load(emit_grads(s), "g")) for n, s in specs.items()}
        self._keep = LAUNCH(self.launch)
        library.fake(*capability, self._keep)

    def launch(self, at, sizes, params):
        try:
            self.run(self.entries[at], sizes[:7], params)
        except Exception as error:  # which C cannot pass on
            self.failure = error
            return 999
        return 0

    def run(self, entry, sizes, params):
        assert sizes[3:] == [32 * entry["warps"], 1, 1, entry["shared"]]
        kinds = [k for k in entry["signature"].values() if k != "constexpr"]
        args = []
        for i, kind in enumerate(kinds):
            if kind == "i32":
                args.append(ctypes.c_int32.from_address(params[i]).value)
                continue
            at = ctypes.c_void_p.from_address(params[i]).value
            # the interpreter reads addresses only: one element stands for all
            memory = (ctypes.c_char * DTYPES[kind].itemsize).from_address(at)
            args.append(torch.frombuffer(memory, dtype=DTYPES[kind]))
        for i in range(len(kinds), entry["parameters"]):
            assert ctypes.c_void_p.from_address(params[i]).value is None
        grads = entry["function"].startswith("grads_")
        kernel = getattr(self.modules[entry["spec"]][grads], entry["function"])
        kernel[tuple(sizes[:3])](*args, **entry["constants"])
        self.launched.append(entry["name"])


@pytest.fixture
def served(library):
    bundle = read(BUNDLE)
    card = Card(library, bundle)
    loaded = Loaded(bundle, library)
    launch.serve(loaded.modules)
    K._prepared.clear()
    spec = next(iter(loaded.modules))
    K.use_float32(spec.precision)
    yield card, spec
    K.use_float32(None)
    launch.serve({})
    K._prepared.clear()


def make(spec, rows):
    g = torch.Generator().manual_seed(rows)

    def r(*shape):
        return torch.randn(*shape, generator=g) * shape[-1] ** -0.5

    scores = torch.rand(rows, spec.experts, generator=g)
    return [
        r(rows, spec.d) * 3, scores, torch.tensor(0.5), r(spec.d_ff, spec.d), r(spec.d_ff),
        r(spec.d_ff, spec.d), r(spec.d_ff), r(spec.d_ff, spec.d_out), r(spec.d_out),
        spec.expert_size, spec.act,
    ]  # fmt: skip


def test_every_kernel_launches_and_computes_the_reference(served):
    card, spec = served
    calls = [(1, "few"), (5, "few"), *((40, p) for p in ("masked", "blocks", "lists", "pairs"))]
    for rows, plan in calls:
        args = make(spec, rows)
        got = launch.run(spec, plan, *args[:9])
        assert torch.allclose(got, reference(*args), atol=1e-4), (plan, card.failure)
        down, up = torch.randn(WIDTH, spec.d), torch.randn(spec.experts, WIDTH)
        scores = torch.relu(args[0] @ down.T).matmul(up.T).abs()
        got = launch.run(spec, plan, args[0], (down, up), *args[2:9])
        assert torch.allclose(got, reference(args[0], scores, *args[2:]), atol=1e-4), plan
    args = make(spec, 40)
    live = [t.requires_grad_() if i not in (1, 2) else t for i, t in enumerate(args[:9])]
    given = [t for t in live if t.requires_grad]
    grad = torch.randn(40, spec.d_out)
    want = torch.autograd.grad(reference(*live, *args[9:]), given, grad)
    with torch.no_grad():
        frozen = [True, False, False, True, False, True, False, True, False]
        gradients(spec, grad, *args[:9], wanted=frozen)
        for a, b in zip(gradients(spec, grad, *args[:9]), want, strict=True):
            assert torch.allclose(a, b, atol=1e-3)
    assert {e["name"] for e in card.entries} == set(card.launched)


def test_the_op_runs_them_and_generates_nothing(served, monkeypatch):
    card, spec = served
    monkeypatch.setattr(launch, "load", lambda *a: pytest.fail("text was generated"))
    args = make(spec, 3)
    assert torch.allclose(K.dynk_ffn_cuda(*args), reference(*args), atol=1e-4)
    assert card.launched == ["few-16", "finish"]
    assert not K.fallbacks()


def test_what_a_kernel_was_not_compiled_for_is_refused(served):
    card, spec = served
    args = make(spec, 3)
    with pytest.raises(CompileError, match=r"no kernel few of .*build it again with skimp aot"):
        launch.run(spec, "few", *args[:9], tiles=Tiles(16, 16, 32, 64, 4, 2))
    shifted = torch.randn(3 * spec.d + 1)[1:].view(3, spec.d)
    with pytest.raises(CompileError, match=r"aligned to 16 bytes.*serve no bundle"):
        launch.run(spec, "few", shifted, *args[1:9])
    with pytest.raises(CompileError, match=r"takes \*fp32"):
        launch.run(spec, "few", args[0], args[1].half(), *args[2:9])
    assert not card.launched


def test_an_error_of_the_driver_is_ours(library):
    bundle = read(BUNDLE)
    Card(library, bundle, capability=(9, 0))
    with pytest.raises(CompileError, match=r"for sm_80, device 0 is sm_90.*aot --target sm_90"):
        Loaded(bundle, library)
    Card(library, bundle, capability=(12, 1))
    with pytest.raises(CompileError, match="device 0 is sm_121"):
        Loaded(bundle, library)
    with pytest.raises(CompileError, match="cuDeviceGet failed with CUDA error 101"):
        Loaded(bundle, library, device=1)
    Card(library, bundle)
    with pytest.raises(CompileError, match="cuModuleLoadData failed with CUDA error 200"):
        Loaded(replace(bundle, binaries=dict.fromkeys(bundle.binaries, b"none")), library)
    with pytest.raises(CompileError, match="cannot load kernels for gfx942"):
        Loaded(replace(bundle, target="gfx942"), library)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_a_machine_without_a_driver_says_so():
    with pytest.raises(CompileError, match="no CUDA driver"):
        serve(BUNDLE)
