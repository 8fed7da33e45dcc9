"""Pruning and the D2DMoE passes on one U-Net: what is found, that it runs, and what both save."""

import sys
from pathlib import Path

import pytest
import torch
from skimp.passes.budget import set_tau
from skimp.passes.convert import convert
from skimp.passes.lift import blocks
from skimp.passes.prune_unet import PruneUNet, example_of, prune
from skimp.passes.route import Split
from skimp.passes.sparsify import Relufy
from skimp.passes.unet_cost import joint
from skimp.passes.unet_graph import discover, export_unet

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))
from unets import two


@pytest.fixture(scope="module")
def both():
    """A pruned U-Net whose gated networks run some of their experts, untrained."""
    torch.manual_seed(0)
    teacher = two(16)
    data = [example_of(teacher, length=3) for _ in range(2)]
    gm = export_unet(teacher, data[0])
    how = PruneUNet(preset="koala-700m")
    made = prune(teacher, data[0], how, captured=(gm, discover(gm)), verified=False)
    done = convert(
        made.student, data, projections=True,
        passes=[Relufy(), Split(rows=64)],
        output=lambda out, batch: out[0].flatten(1),
    )  # fmt: skip
    set_tau(done.model, 0.8)
    return made, done, data


def test_gated_networks_and_projections_of_a_student_are_found(both):
    _, done, _ = both
    sites = done.found.sites
    assert len(sites) == 3
    assert all(s.gated and s.act == "gelu" and s.fused == "up_gate" for s in sites)
    roles = [p.role for p in done.found.projections]
    assert {r: roles.count(r) for r in set(roles)} == dict(query=6, key=6, value=6, output=6)
    assert len(blocks(done.model)) == 3


def test_the_graph_takes_other_batches(both):
    made, done, _ = both
    with torch.no_grad():
        got = done.model(**example_of(made.student, batch=5, length=3))[0]
    assert got.shape == (5, 4, 8, 8)


def test_what_both_save_is_counted_once(both):
    made, done, data = both
    found = joint(made.report, done.model, data)
    assert found["pruned"] == made.report["flops"]["student"]
    assert found["sparse left"] < found["pruned left"] < 1
    assert 0 < found["converted"] < 1
    saved = found["converted"] * (1 - found["blocks left"])
    assert found["sparse"] == pytest.approx(found["pruned"] * (1 - saved))
    set_tau(done.model, 0.0)  # every expert, and the routers on top
    assert joint(made.report, done.model, data)["blocks left"] > 1
    for block in blocks(done.model).values():
        block.dense = True
    assert joint(made.report, done.model, data)["sparse"] == pytest.approx(found["pruned"])
