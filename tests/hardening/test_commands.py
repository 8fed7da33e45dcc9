"""Commands that are killed at every change of a file: what is left, and that they can go on."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from commands import COMMANDS
from moments import answers

SLOW = {"pt2": 3, "mlir": 3, "onnx": 4, "iree": 3, "train-drafter": 12}
"""How many moments are enough of what takes seconds each time."""


def attack(root, most, *names):
    return answers("commands.py", "--most", str(most), root, *names)


def test_killed_at_some_changes_of_a_file(tmp_path):
    found = attack(tmp_path, 2, "calibrate")["calibrate"]
    assert found == {was: {"moments": 3, "left": [was, was]} for was in ("nothing", "old")}


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_killed_at_every_change_of_a_file(name, tmp_path):
    found = attack(tmp_path, SLOW.get(name, 40), name)[name]
    assert found["nothing"]["left"][0] == "nothing"
    assert found["old"]["left"][0] == "old"
