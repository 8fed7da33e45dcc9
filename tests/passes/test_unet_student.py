"""Students: inherited weights, names, configurations, and the rewrites that run silently."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from skimp.ir.errors import PlanError, VerificationError
from skimp.passes.prune_unet import PruneUNet, cut, example_of, prune, verify_student
from skimp.passes.unet_graph import discover, export_unet
from skimp.passes.unet_plan import preset, resolve
from skimp.passes.unet_student import config_of, provenance, prune_in_place, rebuilt
from torch import nn

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))
from unets import sdxl


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = sdxl()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    example = example_of(model, length=3)
    gm = export_unet(model, example)
    return model, example, gm, discover(gm)


@pytest.fixture(scope="module")
def students(tiny):
    """By preset; the smaller is captured again and compared with the plan."""
    model, example, gm, unet = tiny
    return {
        name: prune(model, example, PruneUNet(preset=name), captured=(gm, unet), verified=again)
        for name, again in (("koala-1b", False), ("koala-700m", True))
    }


def run(model, example):
    with torch.no_grad():
        return model(**example)[0]


def neutralised(tiny, plan):
    """The teacher, with all that goes made to add nothing, and joined skips ignored."""
    model, _, _, unet = tiny
    model = copy.deepcopy(model)
    ends = ("conv2", "proj_out", "to_out.0", "ff.net.2")
    with torch.no_grad():
        for path in plan.paths(unet):
            for name, module in model.get_submodule(path).named_modules():
                if name.endswith(ends):
                    module.weight.zero_()
                    module.bias.zero_()
        for s in unet.joins:
            if not plan.keeps(s):
                shortcut = model.get_submodule(s.name).conv_shortcut
                shortcut.weight.zero_()
                shortcut.weight[:, : s.gives, 0, 0] = torch.eye(s.gives)
                shortcut.bias.zero_()
    return model


@pytest.mark.parametrize("name", ["koala-1b", "koala-700m"])
def test_a_student_is_its_teacher_if_what_goes_does_nothing(tiny, students, name):
    model, example, _, unet = tiny
    plan = students[name].plan
    quiet = neutralised(tiny, plan)
    student = copy.deepcopy(quiet)
    prune_in_place(student, unet, plan)
    assert (run(student, example) - run(quiet, example)).abs().max() == 0
    assert (run(students[name].student, example) - run(model, example)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["koala-1b", "koala-700m"])
def test_weights_are_inherited_bit_by_bit(tiny, students, name):
    model, made = tiny[0], students[name]
    weights, names = model.state_dict(), made.names.teachers(list(model.state_dict()))
    assert names.keys() == made.student.state_dict().keys()
    for new, tensor in made.student.state_dict().items():
        assert torch.equal(tensor, weights[names[new]])
        assert tensor.data_ptr() != weights[names[new]].data_ptr()
    assert names["up_blocks.1.resnets.1.conv1.weight"] == "up_blocks.1.resnets.2.conv1.weight"
    assert names["down_blocks.1.resnets.0.conv1.bias"] == "down_blocks.1.resnets.0.conv1.bias"


@pytest.mark.parametrize("name", ["koala-1b", "koala-700m"])
def test_in_place_rebuilt_saved_and_cut_students_agree(tiny, students, name, tmp_path):
    model, example, gm, unet = tiny
    made = students[name]
    want = run(made.student, example)
    inplace = copy.deepcopy(model)
    prune_in_place(inplace, unet, made.plan)
    again = rebuilt(made.student, "cpu").eval()
    again.load_state_dict(made.student.state_dict())
    made.student.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    graph = copy.deepcopy(gm)
    cut(graph, unet, made.plan)
    for other in (inplace, again, loaded, graph):
        assert (run(other, example) - want).abs().max() == 0
    for key in ("layers_per_block", "transformer_layers_per_block", "mid_block_type"):
        assert loaded.config[key] == made.student.config[key] == inplace.config[key]
    assert loaded.config.layers_per_block == 1 != model.config.layers_per_block
    depths = {n: m.config.num_layers for n, m in loaded.named_modules() if n.endswith("ions.0")}
    assert depths == {
        n: m.config.num_layers for n, m in inplace.named_modules() if n.endswith("ions.0")
    }


def test_forgetting_the_attentions_is_caught(tiny, students):
    """Diffusers pairs resnets with attentions by zip: this runs, as another network."""
    model, example, gm, unet = tiny
    made = students["koala-700m"]
    wrong = copy.deepcopy(made.student)
    for block, teacher in (
        (wrong.down_blocks[1], model.down_blocks[1]),
        (wrong.up_blocks[1], model.up_blocks[1]),
    ):
        block.attentions = copy.deepcopy(teacher.attentions)
        assert len(block.attentions) == len(block.resnets) + 1
    run(wrong, example)
    with pytest.raises(VerificationError, match=r"attentions\.1|never read"):
        verify_student(wrong, example, (gm, unet), made.plan, made.names)


def test_deleting_one_decoder_step_is_caught(tiny, students):
    """Diffusers slices the skips that it needs: this runs, and never reads conv_in's."""
    model, example, gm, unet = tiny
    wrong = copy.deepcopy(model)
    wrong.up_blocks[2].resnets = nn.ModuleList([model.up_blocks[2].resnets[i] for i in (0, 2)])
    run(wrong, example)
    plan = resolve(unet, ["up_blocks.2.resnets.1"])
    with pytest.raises(PlanError, match=r"C\(conv_in\) = 8 is pushed and never popped"):
        verify_student(wrong, example, (gm, unet), plan, provenance(model, unet, plan))
    # and passed off as what a legal plan gives
    made = students["koala-700m"]
    wrong = copy.deepcopy(made.student)
    del wrong.up_blocks[2].resnets[1]
    run(wrong, example)
    with pytest.raises(VerificationError, match=r"up_blocks.2.* C\(up_blocks.2.resnets.0\) = 8"):
        verify_student(wrong, example, (gm, unet), made.plan, made.names)


def test_depths_of_their_own_are_said_in_the_configuration(tiny):
    """Asymmetric: each attention another depth; the decoder's are listed apart."""
    model, example, _, unet = tiny
    layer = "up_blocks.0.attentions.{}.transformer_blocks.1"
    plan = resolve(unet, [layer.format(0), layer.format(2)])
    student = copy.deepcopy(model)
    prune_in_place(student, unet, plan)
    assert student.config.reverse_transformer_layers_per_block == [[1, 2, 1], 1, 1]
    again = rebuilt(student, "cpu").eval()
    again.load_state_dict(student.state_dict())
    assert torch.equal(run(student, example), run(again, example))


def test_what_no_configuration_says_is_refused(tiny):
    model, _, _, unet = tiny
    plan = resolve(unet, ["mid_block.attentions.0.transformer_blocks.1"])
    with pytest.raises(PlanError, match=r"no configuration .* the middle as many layers"):
        prune_in_place(copy.deepcopy(model), unet, plan)


def test_the_pass_runs_in_a_pipeline(tiny):
    from skimp.passes.base import Context

    _, example, gm, unet = tiny
    context = Context(gm, [example], [example])
    result = PruneUNet(preset="koala-700m").run(copy.deepcopy(gm), context)
    assert str(PruneUNet(preset="bk-sdxl")).startswith("prune-unet{preset='bk-sdxl'")
    before, after = result.stats["flops"]
    assert after < 0.7 * before
    assert result.stats["removed"] == preset(unet, "koala-700m").paths(unet)
    assert not config_of(result.gm)


def test_a_search_keeps_what_a_configuration_can_say(tiny):
    model, example, gm, unet = tiny
    how = PruneUNet(keep_params=0.7, by="cosine")
    made = prune(model, example, how, data=[example], captured=(gm, unet), verified=False)
    assert 0.3 < made.report["parameters"]["left"] <= 0.7
    with pytest.raises(PlanError, match="batches of several timesteps"):
        prune(model, example, how, captured=(gm, unet))
    with pytest.raises(PlanError, match="nothing to remove"):
        prune(model, example, PruneUNet(), captured=(gm, unet))
