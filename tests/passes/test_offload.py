"""Weights in mapped files: the same bits, less memory than the model takes, and no file left."""

import copy
import resource
import sys
from pathlib import Path

import pytest
import skimp
import torch
from skimp.ir.errors import UnwritableError, out_of_memory
from skimp.passes.convert import recipe
from skimp.passes.offload import Offload, return_memory
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
from every_pass import PASSES, bert, converted, data, same  # noqa: E402

LIMIT = 96 * 2**20


@pytest.fixture(scope="module")
def in_memory():
    return converted().model


def test_every_pass_has_the_same_bits_and_leaves_no_file(tmp_path, in_memory):
    assert {type(p) for p in PASSES} >= {type(p) for p in recipe(task=True)[:-1]}
    done = converted(offload=tmp_path / "files")
    assert same(done.model, in_memory)
    assert not list((tmp_path / "files").iterdir())
    lie = [p.untyped_storage().filename for p in done.model.parameters() if p.nbytes >= 4096]
    assert lie
    assert all(lie)
    skimp.save(done.model, tmp_path / "saved", data()[0])
    labels = {k: v for k, v in data()[0].items() if k != "labels"}
    again = skimp.load(tmp_path / "saved", bert())
    assert torch.equal(again(**labels).logits, done.model(**labels).logits)


def test_stages_are_gone_on_from_with_and_without(tmp_path, in_memory):
    stages = []
    converted(folder=tmp_path / "stages", passes=PASSES[:3])
    options = dict(folder=tmp_path / "stages", offload=tmp_path / "files")
    done = converted(**options, progress=lambda stage, *_: stages.append(stage))
    assert stages[0] == "finetune"
    assert same(done.model, in_memory)


def llama(**more):
    torch.manual_seed(0)
    config = dict(
        vocab_size=512, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | more)).eval()


def short(model, **more):
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in data(3, 4)]
    passes = [
        Relufy(),
        Sparsify(tokens=64, chunk=32, epochs=1),
        Split(rows=32),
        Route(tokens=64, steps=2),
        Recover(steps=1),
    ]
    return skimp.convert(model, batches, passes=passes, expert_size=64, router_width=8, **more)


def private():
    """Bytes of private memory that this process may write, as the limit counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmData"))


def test_sharded_weights_larger_than_the_memory_there_is(tmp_path):
    source = llama()
    assert sum(p.nbytes for p in source.parameters()) > LIMIT
    source.save_pretrained(tmp_path / "model", max_shard_size="30MB")
    del source
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    short(llama(num_hidden_layers=1))  # loads all that a conversion needs
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = copy.deepcopy(model.model.layers[3].state_dict())
    return_memory()
    old = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (private() + LIMIT, old[1]))
    try:
        done = short(model, offload=tmp_path / "files", folder=tmp_path / "stages")
        skimp.save(done.model, tmp_path / "saved", data()[0])
        with pytest.raises((RuntimeError, MemoryError)) as lack:
            short(model)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old)
    assert out_of_memory(lack.value)
    assert same(done.model, short(model).model)
    now = model.model.layers[3].state_dict()
    assert all(torch.equal(before[k], now[k]) for k in before)


def test_copies_keep_layout_ties_and_what_learns(tmp_path):
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.randn(40, 50).T, requires_grad=False)
    module.b = module.a
    module.small = torch.nn.Parameter(torch.randn(3))
    module.register_buffer("mask", torch.ones(2000, dtype=torch.int64))
    made = Offload(tmp_path).copy(module)
    assert made.a is made.b
    assert made.a.data_ptr() != module.a.data_ptr()
    assert made.a.stride() == copy.deepcopy(module).a.stride() == (1, 50)
    assert not made.a.requires_grad
    assert same(made, module)
    assert made.small.requires_grad
    assert made.mask.untyped_storage().filename
    parts = [torch.randn(n, 700, dtype=torch.bfloat16) for n in (3, 1, 5)]
    assert torch.equal(Offload(tmp_path).join(parts), torch.cat(parts))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableError, match="file cannot be written"):
        converted(offload=tmp_path / "file")
