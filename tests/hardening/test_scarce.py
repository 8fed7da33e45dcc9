"""A disk that is really full, too little memory, two at once: a message, and nothing half."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from moments import answers

ALONE = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o "size=$1" none "$2" && shift 2 && "$@"']
"""Runs a command where a folder is a file system in memory, which nobody else sees."""


MODELS = ["convert", "safetensors", "onnx", "mlir", "iree", "pt2"]


def scarce(what, root, *names, size=None):
    within = () if size is None else (*ALONE, "sh", size, root)
    return answers("scarce.py", what, root, *names, within=within)


def needs_a_disk(root):
    try:
        done = subprocess.run([*ALONE, "sh", "1m", root, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not here")
    if done.returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")


@pytest.mark.nightly
def test_a_full_disk(tmp_path):
    needs_a_disk(tmp_path)
    found = scarce("space", tmp_path, "calibrate", "ledger", size="3m")
    assert "No space left on device" in found["calibrate"][0]
    assert found["ledger"] == "the ledger cannot be written: database or disk is full"


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", MODELS)
def test_a_disk_too_full_for_a_model(name, tmp_path):
    """Caches and temporary files are on it too, where torch and compilers write first."""
    pytest.importorskip("transformers")
    needs_a_disk(tmp_path)
    for told in scarce("space", tmp_path, name, size="900m")[name]:
        assert "No space left on device" in told or "no space left in" in told


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_two_conversions_into_one_folder(tmp_path):
    """One is refused while another runs, however that was slowed down, and that one ends well."""
    pytest.importorskip("transformers")
    told = scarce("twice", tmp_path, "convert")["convert"]
    assert told.startswith("error: another process is converting into model-stages; wait for it")


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["calibrate", "convert", "mlir", "pt2", "safetensors"])
def test_too_little_memory(name, tmp_path):
    """Not of exports to ONNX and IREE: where memory ends in native code, it ends the process."""
    tries = scarce("memory", tmp_path, name)[name]
    assert tries[0][1] == 1
    assert tries[-1][1] == 0
