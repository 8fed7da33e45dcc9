"""A conversion that ends in the middle of a pass goes on from the layer, to the same bits."""

import sys
from pathlib import Path

import pytest
import torch
from skimp.ir import artefact

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
from every_pass import PASSES, converted, same


class Ended(BaseException):
    pass


def counted(after):
    """Does what ``map`` does, and ends the process's work after so many layers."""
    done = []

    def each(work, items):
        for item in items:
            if len(done) == after:
                raise Ended
            done.append(1)
            yield work(item)

    return each, done


@pytest.fixture(scope="module")
def whole():
    each, done = counted(-1)
    return converted(each=each).model, len(done)


@pytest.mark.parametrize("after", [1, 7, 11, 19, 21, 27, 33])
def test_no_layer_is_done_twice(after, tmp_path, whole):
    want, work = whole
    options = dict(folder=tmp_path / "stages")
    each, _ = counted(after)
    with pytest.raises(Ended):
        converted(**options, each=each)
    each, again = counted(-1)
    assert same(converted(**options, each=each).model, want)
    # the layer at work is not, whose result the pass had not taken
    assert after + len(again) == work
    assert not (tmp_path / "stages" / "layers").exists()


def test_again_and_again_with_its_tensors_in_files(tmp_path, whole):
    options = dict(folder=tmp_path / "stages", offload=tmp_path / "files")
    for _ in range(20):
        each, _ = counted(3)
        try:
            done = converted(**options, each=each)
            break
        except Ended:
            pass
    assert same(done.model, whole[0])


@pytest.mark.parametrize("what", ["damaged", "another model's", "of another pass"])
def test_a_layer_that_is_not_this_one_is_done_again(what, tmp_path, whole):
    folder = tmp_path / "stages"
    each, _ = counted(7)
    with pytest.raises(Ended):
        converted(folder=folder, each=each)
    layers = sorted((folder / "layers").iterdir())
    assert layers
    for layer in layers:
        if what == "damaged":
            (weights,) = layer.glob("weights-*")
            weights.write_bytes(weights.read_bytes()[:-1])
        elif what == "another model's":
            artefact.write(layer, torch.nn.Linear(2, 2), artefact.read_index(layer)["record"])
        else:
            record = artefact.read_index(layer)["record"] | {"identity": "x"}
            artefact.write(layer, torch.nn.Linear(2, 2), record)
    each, again = counted(-1)
    assert same(converted(folder=folder, each=each).model, whole[0])
    assert len(again) == whole[1]


def test_in_memory_alone_stages_are_stored_and_no_layers(tmp_path, monkeypatch):
    wrote = []
    real = artefact.write

    def write(folder, *more):
        wrote.append(folder)
        real(folder, *more)

    monkeypatch.setattr(artefact, "write", write)
    converted(folder=tmp_path / "stages")
    assert wrote == [tmp_path / "stages"] * len(PASSES)
