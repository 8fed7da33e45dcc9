"""GPU kernels without a GPU: interpreted numbers, generated text, compiled code, bundles."""

import json
import os
import random
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
from skimp.codegen.triton.report import GATED, PLAIN
from skimp.codegen.triton.spec import (
    ITEM_BYTES,
    Tiles,
    TritonSpec,
    candidates,
    choose,
    default_tiles,
    shape_class,
)
from skimp.ir import reference
from skimp.ir.errors import ArtefactError, CompileError
from skimp.ir.op import use_cuda_kernel

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from archives import rewritten  # noqa: E402

RECORD = json.loads((ROOT / "benchmarks" / "results" / "gpu-static.json").read_text())
RAGGED = TritonSpec("gelu_tanh", True, True, True, False, 5, 30, 60, 7, "float32")
SPECS = {"gated": GATED, "plain": PLAIN, "ragged": RAGGED}
SCORED = TritonSpec("scored", False, False, False, False, 1, 576, 1536, 576, "bfloat16")
BUNDLED = TritonSpec("gelu_tanh", True, True, True, True, 20, 24, 60, 16, "float32", "tf32x3")
WIDTH = 12


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["triton", "lower", "bundle"])
def test_interpreted_kernels_compute_the_reference(what, bundled):
    path = Path(__file__).with_name(f"interpreted_{what}.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "SKIMP_TEST_BUNDLE": str(bundled),
                                "SKIMP_TEST_WIDTH": str(WIDTH)}  # fmt: skip
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
    check_text(part(SPECS[name]), path)


def test_the_generated_text_where_scores_weight_experts():
    check_text(emit(SCORED), Path(__file__).parents[1] / "golden" / "triton" / "scored.expected")


def check_text(got, path):
    compile(got, path.name, "exec")
    if os.environ.get("SKIMP_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(got)
    assert got == path.read_text(), "see 'Accept a change of generated code' in CONTRIBUTING.md"


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
            assert c.spills == 0, (target, name, c.kernel.name)
            if target.startswith("sm_"):  # two pointers to scratch memory follow the arguments
                arguments = [k for k in c.kernel.signature.values() if k != "constexpr"]
                assert c.parameters == len(arguments) + 2


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_kernels_of_a_gate_as_the_router_compile_and_fit(target):
    for c in compile_all(SCORED, target):
        assert c.kernel.function in ("few", "weighted", "finish")
        assert c.shared <= SHARED_LIMIT[target]
        assert c.spills == 0
        if c.kernel.function == "few":
            assert loads_weights_wide(SCORED, c.kernel, target, c.wide_loads)
        assert report.line(c)["bound"] == "memory"


def loads_weights_wide(spec, kernel, target, wide_loads):
    """Whether all weights that a program of `few` needs at once come 16 bytes at a time or more."""
    c, threads = kernel.constants, kernel.warps * (32 if target.startswith("sm_") else 64)
    weights = c["BH"] * ((2 if spec.gated else 1) * c["BK"] + c["BO"])
    return wide_loads * threads >= weights * ITEM_BYTES[spec.dtype]


UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx": "v_mfma"}
MANY = ("blocks", "lists_hidden", "pairs", "grads_hidden", "grads_input")


def test_the_instructions_are_those_meant(built):
    for (target, _), found in built.items():
        by_name = {c.kernel.name: c for c in found}
        for name in MANY:
            unit = UNITS.get(target, UNITS["gfx"])
            assert by_name[name].matrix.startswith(unit), (target, name)
        for name, c in by_name.items():
            if c.kernel.function == "few":
                assert loads_weights_wide(c.spec, c.kernel, target, c.wide_loads), (target, name)
            if c.kernel.function in ("score_route", *MANY[:3]):
                assert c.wide_loads, (target, name)
            if "16" in name or c.kernel.function in ("score_route", "grads_weight"):
                assert c.matrix, (target, name)


def test_the_report_is_of_the_kernels_as_they_are():
    """Not compiled again here: its entries know all that they depend on, by digest."""
    if RECORD["triton"] != triton.__version__:
        pytest.skip(f"the report is of Triton {RECORD['triton']}")
    expected = {(spec.name, target, k.name): report.digest(spec, k, target)
                for spec, target in report.configurations()
                for k in kernels_of(spec, target)}  # fmt: skip
    got = {(x["spec"], x["target"], x["kernel"]): x["digest"] for x in RECORD["kernels"]}
    assert got == expected, "kernels changed; run python benchmarks/gpu.py --static"


def test_no_default_configuration_spills():
    """Every kernel of every dtype, arithmetic and class of default tiles."""
    seen = set()
    for x in RECORD["kernels"]:
        spec = TritonSpec(**RECORD["specs"][x["spec"]])
        where = (x["target"], report.title(spec), x["kernel"])
        assert x["shared"] <= SHARED_LIMIT[x["target"]], where
        assert x["spills"] == 0 or x["target"] not in ("sm_80", "sm_90"), where
        if x["kernel"] in MANY and spec.dtype != "float32":
            assert x["matrix"].startswith(UNITS.get(x["target"], UNITS["gfx"])), where
        if x["kernel"] in MANY and spec.precision != "ieee":
            assert x["matrix"], where
        if x["kernel"].startswith("few"):
            kernel = next(k for k in kernels_of(spec, x["target"]) if k.name == x["kernel"])
            assert loads_weights_wide(spec, kernel, x["target"], x["wide_loads"]), where
        seen.add((x["target"], spec.dtype, spec.precision, spec.gated))
    arithmetic = (("bfloat16", "ieee"), ("float16", "ieee"), *(
        ("float32", p) for p in ("ieee", "tf32", "tf32x3")
    ))  # fmt: skip
    assert seen >= {(t, *a, g) for t in ("sm_80", "sm_90") for a in arithmetic
                    for g in (False, True)}  # fmt: skip
    assert {t for t, *_ in seen} == set(TARGETS)


def test_the_report_says_what_the_compiler_says(built):
    if RECORD["triton"] != triton.__version__:
        pytest.skip(f"the report is of Triton {RECORD['triton']}")
    held = {(x["spec"], x["target"], x["kernel"]): x for x in RECORD["kernels"]}
    for found in built.values():
        for c in found:
            x = held[c.spec.name, c.target, c.kernel.name]
            assert report.line(c) == {k: x[k] for k in report.line(c)}


def test_the_document_is_the_report():
    """Word for word: nothing in it can be of another day."""
    assert (ROOT / "docs" / "kernels.md").read_text() == report.document(RECORD)


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
    assert found["predicted_us"] == pytest.approx(
        (1 << 20) * 3072 * 3072 / 989.5e12 * 1e6, rel=1e-3
    )
    assert report.line(by_name["few-1"])["bound"] == "memory"
    routed = report.work(by_name["score_route-pairs-router-128"], 1000, 0.25)
    assert routed.flops == 2 * 1000 * 128 * (768 + 24)
    assert routed.traffic == 1000 * (768 * 2 + 4 * 24 * 0.25) + 128 * (768 + 24) * 2
    slow = report.DEVICES["sm_80"].peak(replace(PLAIN, dtype="float32", precision="tf32x3"))
    assert slow == 156e12 / 3
    for found in built.values():
        for c in found:
            done = report.line(c)
            assert done["predicted_us"] > 0
            assert 0 < done["occupancy"] <= 1


def test_unknown_targets_are_refused():
    with pytest.raises(CompileError, match="'sm_12' is not one of sm_80"):
        compile_kernel(GATED, kernels_of(GATED)[0], "sm_12")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "block.kernels"
    bundle.write(path, [(BUNDLED, WIDTH)], "sm_80")
    return path


def test_a_bundle_is_read_in_a_fresh_process(bundled):
    code = (
        "import sys, pathlib; from skimp.codegen.triton import driver; "
        "b = driver.read(pathlib.Path(sys.argv[1])); assert 'triton' not in sys.modules; "
        "print(b.target, len(b.manifest['kernels']))"
    )
    got = subprocess.run(
        [sys.executable, "-c", code, bundled], check=True, capture_output=True, text=True
    )
    assert got.stdout.split() == ["sm_80", str(len(kernels_of(BUNDLED, "sm_80", WIDTH)))]
    assert [p.name for p in bundled.parent.iterdir()] == [bundled.name]


def test_a_bundle_is_the_same_each_time_and_holds_both_widths(bundled, tmp_path):
    path = tmp_path / "b"
    bundle.write(path, [(BUNDLED, WIDTH)], "sm_80")
    assert path.read_bytes() == bundled.read_bytes()
    made = bundle.write(path, [(BUNDLED, WIDTH), (BUNDLED, 5)], "sm_80")
    one = {k.name for k in kernels_of(BUNDLED, "sm_80", WIDTH)}
    assert {c.kernel.name for c in made} - one == {
        f"{k}-router-5" for k in ("score-1", "score-16", "score_route-lists", "score_route-pairs")
    }


def test_a_truncated_bundle_is_refused(bundled, tmp_path):
    path, whole = tmp_path / "b", bundled.read_bytes()
    with zipfile.ZipFile(bundled) as held:
        starts = [i.header_offset for i in held.infolist()]
    for size in {0, 1, 100, *starts, *range(0, len(whole), len(whole) // 50), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(ArtefactError, match="build it again"):
            bundle.read(path)
    with pytest.raises(ArtefactError, match="no whole bundle"):
        bundle.read(tmp_path / "none")


def test_a_change_of_any_file_is_refused(bundled, tmp_path):
    path = tmp_path / "b"
    names = zipfile.ZipFile(bundled).namelist()
    assert len(names) > 20
    for which in names:
        for change in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data + b" ",
                       lambda data: data[:-1], lambda data: b"", lambda data: None):  # fmt: skip
            if which == "digest.json" and change(b"{} ") == b"{}  ":
                continue  # a blank after the digest says the same
            rewritten(bundled, path, lambda n, d, w=which, c=change: c(d) if n == w else d)
            with pytest.raises(ArtefactError, match="build"):
                bundle.read(path)
    rewritten(bundled, path, lambda name, data: data)
    assert bundle.read(path) == bundle.read(bundled)
    with zipfile.ZipFile(path, "a") as held:
        held.writestr("more", b"")
    with pytest.raises(ArtefactError, match="files that it should not"):
        bundle.read(path)


def test_damage_of_any_bit_is_refused_or_without_effect(bundled, tmp_path):
    path, whole, want = tmp_path / "b", bundled.read_bytes(), bundle.read(bundled)
    draw, refused = random.Random(0), 0
    for _ in range(300):
        at = draw.randrange(len(whole))
        changed = bytearray(whole)
        changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert bundle.read(path) == want, at  # of what a zip file holds, dates mean nothing
        except ArtefactError:
            refused += 1
    assert refused > 250


def test_a_bundle_of_another_version_is_refused(bundled, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "VERSION", bundle.VERSION + 1)
    with pytest.raises(ArtefactError, match=r"has version .*build it again"):
        bundle.read(bundled)


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
        for family in ("ampere", "hopper", "cdna"):
            rows = 16 if plan == "few" else 4096
            found = candidates(PLAIN, plan, rows, family)
            assert len(found) > 1
            assert found[0] == default_tiles(PLAIN, plan, rows, family)


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


def test_words_for_precision():
    with pytest.raises(ValueError, match="not one of ieee"):
        kernels.use_float32("fp8")
