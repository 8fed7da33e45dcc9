"""GPU kernels without a GPU: interpreted numbers, generated text, compiled code, bundles."""

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from skimp.codegen.triton import bundle, kernels, load, report, tuned
from skimp.codegen.triton.aot import SHARED_LIMIT, TARGETS, compile_all, compile_kernel
from skimp.codegen.triton.aot import kernels as kernels_of
from skimp.codegen.triton.emit import emit, emit_grads
from skimp.codegen.triton.spec import Tiles, TritonSpec, candidates, choose, shape_class
from skimp.ir import reference
from skimp.ir.errors import ArtefactError, CompileError
from skimp.ir.op import select, use_cuda_kernel

pytest.importorskip("triton")

GATED = TritonSpec("silu", True, False, False, True, 64, 576, 1536, 576, "bfloat16")
PLAIN = TritonSpec("relu", False, True, False, True, 128, 768, 3072, 768, "bfloat16")
RAGGED = TritonSpec("gelu_tanh", True, True, True, False, 5, 30, 60, 7, "float32")
SPECS = {"gated": GATED, "plain": PLAIN, "ragged": RAGGED}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["triton", "lower"])
def test_interpreted_kernels_compute_the_reference(what):
    path = Path(__file__).with_name(f"interpreted_{what}.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    got = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", path.parents[1] / "pytest.ini", path, "-x"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert got.returncode == 0, got.stdout[-3000:]
    assert " passed" in got.stdout


def test_importing_skimp_does_not_import_triton():
    code = "import skimp, sys; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("part", [emit, emit_grads])
def test_the_generated_text(name, part):
    end = "_grads" if part is emit_grads else ""
    path = Path(__file__).parents[1] / "golden" / "triton" / f"{name}{end}.expected"
    got = part(SPECS[name])
    compile(got, name, "exec")
    if os.environ.get("SKIMP_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(got)
    assert got == path.read_text()


@pytest.fixture(scope="module")
def built():
    """Every kernel of two blocks for every target; Triton keeps them between runs."""
    return {(target, name): compile_all(SPECS[name], target)
            for target in TARGETS for name in ("plain", "gated")}  # fmt: skip


def test_every_kernel_compiles_for_every_target_and_fits(built):
    for (target, name), found in built.items():
        assert [c.kernel for c in found] == kernels_of(SPECS[name], target)
        for c in found:
            assert c.binary[:4] == b"\x7fELF"
            assert c.shared <= SHARED_LIMIT[target], (target, name, c.kernel.name)
            assert c.programs >= 1, (target, name, c.kernel.name)
            known = target == "sm_100" and c.kernel.name == "grads_input"  # two registers
            assert c.spills <= 8 * known, (target, name, c.kernel.name)


def test_the_instructions_are_those_meant(built):
    units = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx": "v_mfma"}
    many = ("blocks", "lists_hidden", "pairs", "grads_hidden", "grads_input")
    for (target, _), found in built.items():
        by_name = {c.kernel.name: c for c in found}
        for name in many:
            unit = units.get(target, units["gfx"])
            assert by_name[name].matrix.startswith(unit), (target, name)
        for name in ("few-1", "few-16", *many[:3]):
            assert by_name[name].wide_loads, (target, name)


def test_the_roofline_by_hand(built):
    """Numbers of the plain block on an H100: 768/3072, 24 experts of 128, bfloat16."""
    by_name = {c.kernel.name: c for c in built["sm_90", "plain"]}
    one = report.work(by_name["few-1"], 1, 0.5)
    assert one.flops == 2 * 1536 * (768 + 768)
    ends = (768 + 24 + 768) * 2 + 768 * 4
    assert one.traffic == 1536 * (768 + 768) * 2 + ends
    both = report.work(by_name["pairs"], 1000, 0.25)
    assert both.flops == 2 * 1000 * 0.25 * 3072 * 1536
    assert both.tile_flops == 2 * 128 * 128 * 1536
    found = report.line(by_name["pairs"], many=1 << 20, share=1.0)
    assert found["bound"] == "products"
    assert found["predicted_us"] == pytest.approx((1 << 20) * 3072 * 3072 / 989e12 * 1e6, rel=1e-3)
    assert report.line(by_name["few-1"])["bound"] == "memory"
    for found in built.values():
        for c in found:
            done = report.line(c)
            assert done["predicted_us"] > 0
            assert 0 < done["occupancy"] <= 1


def test_the_document_holds_every_kernel(built):
    text = report.document([c for found in built.values() for c in found])
    assert text.count("| few-1 |") == len(built)
    path = Path(__file__).parents[2] / "docs" / "kernels.md"
    heads = [x for x in text.splitlines() if x.startswith("#")]
    assert [x for x in path.read_text().splitlines() if x.startswith("#")] == heads


def test_unknown_targets_are_refused():
    with pytest.raises(CompileError, match="'sm_12' is not one of sm_80"):
        compile_kernel(GATED, kernels_of(GATED)[0], "sm_12")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "block.kernels"
    bundle.write(path, [replace(RAGGED, d=16)], "sm_80")
    return path


def test_a_bundle_is_read_in_a_fresh_process(bundled):
    code = (
        "import sys, pathlib; from skimp.codegen.triton.bundle import read; "
        "b = read(pathlib.Path(sys.argv[1])); assert 'triton' not in sys.modules; "
        "print(b.target, len(b.manifest['kernels']))"
    )
    got = subprocess.run(
        [sys.executable, "-c", code, bundled], check=True, capture_output=True, text=True
    )
    assert got.stdout.split() == ["sm_80", str(len(kernels_of(RAGGED, "sm_80")))]
    assert [p.name for p in bundled.parent.iterdir()] == [bundled.name]


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_bundle_is_refused(bundled, tmp_path, size):
    path = tmp_path / "b"
    path.write_bytes(bundled.read_bytes()[:size])
    with pytest.raises(ArtefactError, match="build it again"):
        bundle.read(path)


@pytest.mark.parametrize("which", ["manifest.json", "kernel"])
def test_a_changed_bundle_is_refused(bundled, tmp_path, which):
    path = tmp_path / "b"
    with zipfile.ZipFile(bundled) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            changed = name == which or (which == "kernel" and not name.endswith(".json"))
            new.writestr(name, data.replace(b"sm_80", b"sm_90") + b" " if changed else data)
    with pytest.raises(ArtefactError, match="changed"):
        bundle.read(path)


class Driver:
    """A CUDA driver of a device of compute capability 9.0."""

    def __init__(self, minor=0):
        self.calls, self.capability = [], {75: 9, 76: minor}

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            if name == "cuDeviceGetAttribute":
                args[0]._obj.value = self.capability[args[1]]
            return 0

        return call


def test_another_architecture_is_refused(bundled):
    with pytest.raises(CompileError, match="for sm_80, device 0 is sm_90"):
        bundle.functions(bundle.read(bundled), Driver())
    held = replace(bundle.read(bundled), target="sm_90")
    found = bundle.functions(held, Driver())
    assert len(found) == len(held.manifest["kernels"])


def test_a_machine_without_a_driver_says_so(bundled):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(CompileError, match="no CUDA driver"):
        bundle.functions(bundle.read(bundled))


def test_a_damaged_cache_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIMP_CACHE", str(tmp_path))
    load.load.cache_clear()
    load.load(emit(RAGGED), "k")
    path = next((tmp_path / "triton").glob("k_*.py"))
    path.write_text("raise SystemExit")
    load.load.cache_clear()
    assert hasattr(load.load(emit(RAGGED), "k"), "pairs")


def test_tuning_is_remembered_and_damage_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIMP_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_found", {})
    monkeypatch.setattr(tuned, "_read", set())
    device, tiles = torch.device("cpu"), Tiles(64, 64, 32, 32, 4, 2)
    case = shape_class(100)
    assert tuned.recall(GATED, case, device) is None
    tuned.remember(GATED, case, device, "lists", tiles, write=True)
    tuned._found.clear()
    tuned._read.clear()
    assert tuned.recall(GATED, case, device) == ("lists", tiles)
    next((tmp_path / "triton").glob("tuned-*.json")).write_text("{")
    tuned._found.clear()
    tuned._read.clear()
    assert tuned.recall(GATED, case, device) is None


def test_the_choice_of_kernels():
    assert choose(PLAIN, 1) == choose(PLAIN, 16) == "few"
    assert choose(PLAIN, 16, deterministic=True) == choose(PLAIN, 17) == "masked"
    assert choose(PLAIN, 50432) == "lists"
    single = replace(PLAIN, dtype="float32", precision="tf32x3")
    assert choose(single, 50432) == "pairs"
    assert choose(single, 50432, deterministic=True) == "masked"
    for plan in ("few", "masked", "lists", "pairs", "blocks"):
        assert len(candidates(PLAIN, plan, 16 if plan == "few" else 4096)) > 1


def test_the_op_is_served_on_cuda_only():
    called = []
    use_cuda_kernel(lambda *a: called.append(a))
    try:
        x = torch.randn(2, 8)
        args = (x, torch.rand(2, 2), torch.tensor(0.5), torch.randn(8, 8), None, None, None,
                torch.randn(8, 8), None, 4, "relu")  # fmt: skip
        got = torch.ops.skimp.dynk_ffn(*args)
        assert torch.allclose(got, reference(*args), atol=1e-5)
        assert not called
    finally:
        kernels.install()


def test_the_threshold_is_rounded_once():
    """As kernels do; PyTorch on GPUs would round tau to bfloat16 too, and run other experts."""
    scores = torch.rand(64, 64).bfloat16()
    limit = (0.3 * scores.float().amax(-1, keepdim=True)).bfloat16()
    assert torch.equal(select(scores, torch.tensor(0.3)), scores >= limit)


def test_words_for_precision():
    with pytest.raises(ValueError, match="not one of ieee"):
        kernels.use_float32("fp8")
