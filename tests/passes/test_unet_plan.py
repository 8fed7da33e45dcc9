"""Discovery on exported U-Nets, the paper's counts, and which removals are legal."""

import re
import sys
from pathlib import Path

import pytest
import torch
from skimp.ir.errors import NothingToConvertError, PlanError
from skimp.passes.prune_unet import PruneUNet, example_of, prune
from skimp.passes.unet_distill import DistillUNet
from skimp.passes.unet_graph import discover, export_unet
from skimp.passes.unet_plan import check, one_per_stage, preset, resolve, search
from skimp.passes.unet_rank import RANKINGS, rank
from skimp.passes.unet_student import rebuilt
from torch import nn

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))
from unets import OwnUNet, sd1, sdxl

# parameters, GMAC at 1024 px, tensors and self-attentions, as the paper prints and briefs count
COUNTS = {
    "": (2_567_463_684, 3380.6, 1680, 70),
    "bk-sdxl": (1_717_277_764, 2251.7, 1110, 46),
    "koala-1b": (1_161_184_324, 1715.9, 790, 30),
    "koala-700m": (782_822_724, 1350.8, 584, 21),
}


@pytest.fixture(scope="module")
def real():
    """SDXL's U-Net without memory, its graph, and what was found."""
    with torch.device("meta"):
        model = sdxl(320, (1, 2, 10), small=False)
    gm = export_unet(model, example_of(model, batch=1))
    return model, gm, discover(gm)


def test_the_steps_of_sdxl_are_found(real):
    _, _, unet = real
    assert [s.kind for s in unet.steps].count("push") == 9
    assert len(unet.joins) == 9
    deep = [s for s in unet.stacks if len(s.layers) == 10]
    assert [s.name.split(".")[0] for s in deep].count("down_blocks") == 2
    assert len(deep) == 6
    assert sum(len(s.layers) for s in unet.stacks) == len(unet.taps) == 70
    assert all(t.name.endswith("attn1") for t in unet.taps)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_papers(real, name):
    model, gm, unet = real
    parameters, gmac, tensors, attentions = COUNTS[name]
    student, flops, report = model, unet.flops[""], {"attentions": [70, 70]}
    if name:
        made = prune(model, {}, PruneUNet(preset=name), captured=(gm, unet), verified=False)
        student, report = made.student, made.report
        flops = report["flops"]["student"]
        again = rebuilt(student)
        assert {n: t.shape for n, t in again.state_dict().items()} == {
            n: t.shape for n, t in student.state_dict().items()
        }
    assert sum(p.numel() for p in student.parameters()) == parameters
    assert flops / 2e9 == pytest.approx(gmac, rel=1e-3)
    assert len(student.state_dict()) == tensors
    assert report["attentions"][1] == attentions


@pytest.mark.parametrize(("name", "depth", "count"), [("koala-1b", 6, 30), ("koala-700m", 5, 21)])
def test_taps_are_the_papers(real, name, depth, count):
    model, gm, unet = real
    made = prune(model, {}, PruneUNet(preset=name), captured=(gm, unet), verified=False)
    found, up = (
        DistillUNet(aligned=a).pairs(unet, made.plan, made.names) for a in ("bottom", "up")
    )
    last = {s: t for s, t in found.items() if "attn" not in s}
    assert last == {
        "down_blocks.0.resnets.0": "down_blocks.0.resnets.1",
        "up_blocks.2.resnets.1": "up_blocks.2.resnets.2",
    }
    assert len(found) - len(last) == count
    mine = "up_blocks.0.attentions.1.transformer_blocks"
    theirs = "up_blocks.0.attentions.2.transformer_blocks"
    assert found[f"{mine}.{depth - 1}.attn1"] == f"{theirs}.{depth - 1}.attn1"
    assert list(up) == list(found)
    assert up[f"{mine}.0.attn1"] == f"{theirs}.{10 - depth}.attn1"


def test_bk_leaves_four_deep_stacks(real):
    _, _, unet = real
    plan = preset(unet, "bk-sdxl")
    assert sum(len(plan.kept(unet, s)) == 10 for s in unet.stacks) == 4


def test_one_pair_per_stage_has_eight_legal_plans(real):
    _, _, unet = real
    plans = list(one_per_stage(unet))
    assert len(plans) == len({p.units for p in plans}) == 8
    assert preset(unet, "bk-sdxl") in plans
    gone = {u for p in plans for u in p.units}
    assert {u for u in gone if u.startswith("up_blocks.1")} == {"up_blocks.1.resnets.1"}
    assert {u for u in gone if u.startswith("up_blocks.0")} == {
        "up_blocks.0.resnets.0",
        "up_blocks.0.resnets.1",
    }


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ["down_blocks.1.resnets.1", "up_blocks.1.resnets.0"],
            r"up_blocks.1.resnets.1 reads 1280 channels, but C\(h\) \+ C\(skip\) = 1280 \+ 640 = "
            "1920, from up_blocks.0.upsamplers.0 and down_blocks.1.resnets.0",
        ),
        (["down_blocks.1.resnets.1", "up_blocks.1.resnets.2"], r"upsamplers.1|C\(h\)|reads 960"),
        (["down_blocks.1.resnets.0"], r"down_blocks.1.resnets.1 reads 640 .* C\(h\) = 320"),
        (["up_blocks.2.resnets.1"], r"not end empty: C\(conv_in\) = 320 is pushed and never"),
        (["down_blocks.0.downsamplers.0"], "changes the resolution from 128x128 to 64x64"),
        (["conv_in"], "it reads the input"),
    ],
)
def test_illegal_removals_are_refused_with_the_equation(real, names, reason):
    _, _, unet = real
    miss = check(unet, resolve(unet, names))
    assert miss is not None
    assert re.search(reason, miss.reason), miss.reason


def test_a_stack_keeps_a_layer(real):
    _, _, unet = real
    layers = [f"mid_block.attentions.0.transformer_blocks.{i}" for i in range(10)]
    assert "left without a layer" in check(unet, resolve(unet, layers)).reason
    assert check(unet, resolve(unet, layers[1:])) is None


def test_what_is_not_there_is_refused(real):
    _, _, unet = real
    with pytest.raises(PlanError, match="neither a step nor a transformer layer"):
        resolve(unet, ["down_blocks.7"])
    with pytest.raises(PlanError, match="there are bk-sdxl"):
        preset(unet, "koala-3b")


def test_a_search_keeps_within_its_budget(real):
    model, _, unet = real
    from skimp.passes.prune_unet import parameters

    cost = parameters(model)
    scores = {la: 1.0 + i for s in unet.stacks for i, la in enumerate(s.layers[::-1])}
    plan = search(unet, cost, 0.6, scores)
    left = 1 - sum(cost[p] for p in plan.paths(unet)) / cost[""]
    assert check(unet, plan) is None
    assert 0.5 < left <= 0.6
    with pytest.raises(PlanError, match="no more can go"):
        search(unet, cost, 0.01, scores)


def test_stable_diffusion_1_has_twelve_joins():
    model = sd1()
    unet = discover(export_unet(model, example_of(model, length=3)))
    assert len(unet.joins) == 12
    assert len(unet.stacks) == 16
    assert len(preset(unet, "bk-sdxl").units) == 8


def test_a_u_net_of_another_make_is_found_and_pruned():
    torch.manual_seed(0)
    model, x = OwnUNet().eval(), {"x": torch.randn(2, 3, 8, 8)}
    made = prune(model, x, PruneUNet(remove=("left.1", "right.4", "bottom", "left.3.layers.2")))
    assert len(made.unet.joins) == 6
    assert len(made.unet.taps) == 3 * 5 + 1
    assert made.names.student("left.4.c.weight") == "left.3.c.weight"
    assert len(made.student.left) == 4
    assert made.student(**x).shape == x["x"].shape  # the middle hands its input on


def test_what_is_no_u_net_is_refused():
    with pytest.raises(NothingToConvertError, match="no skip join"):
        discover(export_unet(nn.Sequential(nn.Conv2d(3, 3, 1)), {"input": torch.ones(2, 3, 4, 4)}))


def test_a_layer_that_does_nothing_ranks_last():
    torch.manual_seed(0)
    model, data = OwnUNet().eval(), [{"x": torch.randn(2, 3, 8, 8)} for _ in range(2)]
    idle = model.right[0].layers[1]
    with torch.no_grad():
        for last in (idle.mix.give, idle.net[2]):
            last.weight.zero_()
            last.bias.zero_()
    gm = export_unet(model, data[0])
    unet = discover(gm)
    for by in RANKINGS:
        found = rank(gm, unet, data, by)
        assert found["right.0.layers.1"] == pytest.approx(0, abs=1e-6)
        assert min(found, key=found.__getitem__) == "right.0.layers.1" or by == "attention"
    left = rank(gm, unet, data)
    with torch.no_grad():
        want = sum(
            float((model(**batch) - without(model, batch)).square().sum())
            / float(model(**batch).square().sum())
            for batch in data
        )
    assert left["bottom"] == pytest.approx(want / 2, rel=1e-4)


def without(model, batch):
    """By hand: the middle hands its input on."""
    kept, model.bottom = model.bottom, nn.Identity()
    try:
        return model(**batch)
    finally:
        model.bottom = kept
