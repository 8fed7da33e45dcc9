"""Training over processes of torchrun: the result of one process, from half of the memory each."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from skimp.ir.errors import CalibrationError
from skimp.passes.offload import Offload
from skimp.passes.ranks import Ranks
from skimp.passes.sharded import sharded

SCRIPT = Path(__file__).parent / "sharded_run.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(folder, what, *, processes=2, seconds=240):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *(TORCHRUN if processes > 1 else ()), str(SCRIPT), folder, what]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)),
        env=environment, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip


def told(folder, rank=0):
    return json.loads((folder / f"told{rank}.json").read_text())


def state(folder, rank=0):
    return torch.load(folder / f"state{rank}.pt")


def one_and_two(folder, what):
    for processes in (1, 2):
        done = start(folder / str(processes), what, processes=processes)
        assert not done.returncode, done.stderr
    return folder / "1", folder / "2"


def agree(one, two, apart):
    """The losses of all steps, the weights, and half of the memory in each."""
    alone, shared = told(one), told(two)
    assert len(shared["losses"]) == len(alone["losses"])
    assert shared["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert told(two, 1)["losses"] == shared["losses"]
    want, got = state(one), state(two)
    # thresholds of small data lie between few scores
    found = {k: float((want[k] - got[k]).abs().max()) for k in want if not k.endswith(".tau")}
    assert max(found.values()) < apart
    other = state(two, 1)
    assert all(torch.equal(got[k], other[k]) for k in got)
    for rank in (0, 1):
        own = told(two, rank)
        assert own["bytes"] == pytest.approx([n / 2 for n in alone["bytes"]], rel=0.02)
        assert own["plain"]
        assert not own["flags"]
    assert alone["bytes"]
    assert not told(two, 1)["stages"]  # the first alone says how far it is


def test_two_processes_learn_what_one_does_with_half_of_the_memory(tmp_path):
    spec = importlib.util.spec_from_file_location("sharded_run", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "1").mkdir()
    script.main(tmp_path / "1", "small")
    done = start(tmp_path / "2", "small")
    assert not done.returncode, done.stderr
    assert len(told(tmp_path / "2")["losses"]) == 12
    agree(tmp_path / "1", tmp_path / "2", 1e-4)


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_whole_recipe_and_one_that_goes_on(tmp_path):
    one, two = one_and_two(tmp_path, "bert")
    assert len(told(two)["losses"]) == 12
    agree(one, two, 2e-3)
    half, got = tmp_path / "half", state(two)
    assert not start(half, "half").returncode
    done = start(half, "bert")
    assert not done.returncode, done.stderr
    assert told(half)["stages"][0] == "split"
    for rank in (0, 1):
        again = state(half, rank)
        assert all(torch.equal(got[k], again[k]) for k in got)


@pytest.mark.nightly
def test_a_decoder_without_labels(tmp_path):
    one, two = one_and_two(tmp_path, "llama")
    a, b = (told(f)["history"][-1]["stats"]["loss"] for f in (one, two))
    assert b == pytest.approx(a, rel=1e-5)
    agree(one, two, 1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("failing", "no memory for the task's loss"),
        ("other", "process 1 has another model, other data or options than process 0"),
    ],
)
def test_one_process_that_fails_ends_all_and_says_why(tmp_path, what, says):
    done = start(tmp_path, what, seconds=120)
    assert done.returncode
    assert says in done.stderr
    assert not list(tmp_path.glob("told*"))


def test_parts_are_of_all_rows_and_few_rows_are_everybodys():
    batch = dict(input_ids=torch.arange(14).view(7, 2), scale=torch.ones(3), n=5)
    parts = [r.part(batch) for r in (Ranks(3, i) for i in range(3))]
    assert torch.equal(torch.cat([p["input_ids"] for p in parts]), batch["input_ids"])
    assert [len(p["input_ids"]) for p in parts] == [3, 2, 2]
    assert all(p["scale"] is batch["scale"] for p in parts)
    few = Ranks(8, 3)
    assert few.part(batch) is batch
    assert few.mean(torch.tensor([2.0]), [7]) == 2


def test_a_single_number_cannot_be_divided():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x * self.scale

    gm = torch.fx.symbolic_trace(Scaled())
    with (
        pytest.raises(CalibrationError, match="scale is a single number"),
        sharded(Ranks(2, 0), gm, list(gm.parameters()), Offload()),
    ):
        pass
