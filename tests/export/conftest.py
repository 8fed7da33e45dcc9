"""What the export tests share: one model and one artefact of each kind in a process."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(p) for p in Path(__file__).parents[:2]]  # for models.py and archives.py


@pytest.fixture(scope="session")
def small():
    """A model with one block; tests set the thresholds that they need."""
    pytest.importorskip("transformers")
    from models import Tiny

    return Tiny().eval()


@pytest.fixture(scope="session")
def pt2(small, tmp_path_factory):
    """Its package, and the report of it, with thresholds of 0.3."""
    import skimp
    from models import ids

    path = tmp_path_factory.mktemp("pt2") / "m.pt2"
    skimp.set_tau(small, 0.3)
    return path, skimp.export(small, ids(), path)


@pytest.fixture(scope="session")
def onnx_file(small, tmp_path_factory):
    """Its ONNX file with the library of its kernels beside it, and the report."""
    for needed in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(needed)
    import skimp
    from models import ids

    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    skimp.set_tau(small, 0.3)
    return path, skimp.export(small, ids(), path, native=True)
