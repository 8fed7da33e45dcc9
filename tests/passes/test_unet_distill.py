"""Taps and losses: what is compared with what, however the models are run."""

import copy
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from skimp.ir.errors import PlanError
from skimp.passes.prune_unet import PruneUNet, example_of, prune
from skimp.passes.unet_distill import Distiller, DistillUNet, Taps, feature_loss
from skimp.passes.unet_graph import discover, export_unet
from torch.nn import functional as F

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))
from unets import two


@pytest.fixture(scope="module")
def pair():
    """A teacher of few layers, its student, and a call; from one capture."""
    torch.manual_seed(0)
    teacher = two()
    example = example_of(teacher, length=3)
    gm = export_unet(teacher, example)
    how = PruneUNet(preset="koala-700m")
    made = prune(teacher, example, how, captured=(gm, discover(gm)), verified=False)
    return teacher, made, example


def pairs(made, **how):
    return DistillUNet(**how).pairs(made.unet, made.plan, made.names)


def test_the_ways_to_align_differ_in_the_layer_only(pair):
    _, made, _ = pair
    bottom, up, kept = (pairs(made, aligned=a) for a in ("bottom", "up", "kept"))
    assert bottom == kept  # the first layers stay
    assert bottom.keys() == up.keys()
    changed = {s for s in bottom if bottom[s] != up[s]}
    assert changed
    assert all(bottom[s].replace("former_blocks.0.", "former_blocks.1.") == up[s] for s in changed)
    assert len(pairs(made, taps="last")) == 4  # two stages down and two up, no middle left
    assert pairs(made, taps="none") == {}
    with pytest.raises(PlanError, match="none of bottom, up, kept"):
        DistillUNet(aligned="middle")


def caught(model, names, example, backward=False):
    with Taps(model, names) as taps:
        taps.open()
        out = model(**example)[0]
        found = taps.take()
        if backward:
            (out.square().mean() + sum(f.square().mean() for f in found.values())).backward()
            assert not taps.caught
    return found


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_the_same_is_caught_however_the_model_is_run(pair, tmp_path):
    _, made, example = pair
    names = list(pairs(made))
    plain = copy.deepcopy(made.student).train()
    want = caught(plain, names, example, backward=True)
    assert list(want) == sorted(want, key=list(want).index)
    assert set(want) == set(names)

    again = copy.deepcopy(made.student).train()
    again.enable_gradient_checkpointing()
    got = caught(again, names, example, backward=True)
    assert all(torch.equal(got[n], want[n]) for n in names)
    for (n, a), b in zip(grads(again).items(), grads(plain).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), n

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(made.student).train())
        got = caught(ddp, names, example, backward=True)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(got[n], want[n]) for n in names)

    compiled = torch.compile(copy.deepcopy(made.student), backend="eager")
    with torch.no_grad():
        got = caught(compiled, names, example)
    torch._dynamo.reset()
    assert all(torch.allclose(got[n], want[n], atol=1e-6) for n in names)


def test_nothing_stays_after_teardown(pair):
    teacher, made, example = pair
    distiller = Distiller.make(made.student, teacher, DistillUNet(), pairs(made))
    distiller.losses(example, torch.randn_like(example["sample"]))["total"].backward()
    taps = weakref.ref(distiller.mine)
    distiller.mine.open()
    with torch.no_grad():
        made.student(**example)
    feature = weakref.ref(next(iter(distiller.mine.caught.values())))
    distiller.close()
    del distiller
    gc.collect()
    assert taps() is None
    assert feature() is None
    assert not any(m._forward_hooks for m in (*made.student.modules(), *teacher.modules()))
    made.student.zero_grad()


def test_a_student_that_is_its_teacher_loses_nothing(pair):
    teacher, made, example = pair
    names = [t.name for t in made.unet.taps]
    twin = copy.deepcopy(teacher).requires_grad_(True)
    distiller = Distiller.make(twin, teacher, DistillUNet(), dict(zip(names, names, strict=True)))
    found = distiller.losses(example, torch.zeros_like(example["sample"]))
    found["total"].backward()
    distiller.close()
    assert found["output"] == found["features"] == 0
    assert found["total"] == found["task"] > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert any(p.grad is not None for p in twin.parameters())


def test_losses_are_what_a_hand_computes(pair):
    teacher, made, example = pair
    how, noise = DistillUNet(task=0.5, output=2.0, features=3.0), torch.randn(2, 4, 8, 8)
    chosen = pairs(made)
    distiller = Distiller.make(made.student, teacher, how, chosen)
    with torch.no_grad():
        found = distiller.losses(example, noise)
        distiller.close()
        mine, theirs = made.student(**example)[0], teacher(**example)[0]
        a = caught(made.student, list(chosen), example)
        b = caught(teacher, list(chosen.values()), example)
        features = sum((a[s] - b[t]).square().mean() for s, t in chosen.items())
    total = 0.5 * F.mse_loss(mine, noise) + 2 * F.mse_loss(mine, theirs) + 3 * features
    assert torch.allclose(found["features"], features)
    assert torch.allclose(found["total"], total)
    with pytest.raises(PlanError, match="the same widths"):
        feature_loss({"a": torch.ones(2, 3)}, {"b": torch.ones(2, 4)}, {"a": "b"})
