"""The drop-in for ``model.generate``, and the command."""

import copy
import gc
import json
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

import skimp  # noqa: E402
from skimp.ir.errors import SkimpError  # noqa: E402
from skimp.passes.budget import set_tau  # noqa: E402
from skimp.runtime.tree.generate import TreeDecoder  # noqa: E402
from skimp.runtime.tree.hf import HFTarget  # noqa: E402
from skimp.runtime.tree.stream import Printer  # noqa: E402

from .drafters import Given  # noqa: E402
from .models import by_gate, llama  # noqa: E402

CASES = {
    "new tokens": dict(max_new_tokens=24),
    "length": dict(max_length=30),
    "default length": dict(),
    "penalty": dict(max_new_tokens=20, repetition_penalty=1.3),
    "ends": dict(max_new_tokens=40, eos_token_id=[7, 11, 30], pad_token_id=0),
}


def padded(side):
    """Three prompts of different lengths as a tokenizer pads them."""
    g = torch.Generator().manual_seed(3)
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for i, n in enumerate((9, 2, 5)):
        where = slice(9 - n, 9) if side == "left" else slice(0, n)
        ids[i, where] = torch.randint(1, 61, (n,), generator=g)
        mask[i, where] = 1
    return dict(input_ids=ids, attention_mask=mask)


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.mark.filterwarnings("error:decoding runs the model's own code")
def test_a_model_whose_gates_are_its_routers_writes_its_own_text():
    model, ids = by_gate(llama(seed=3), 0.05), torch.tensor([[5, 9, 2, 5, 9, 2, 5]])
    options = dict(max_new_tokens=40, do_sample=False)
    want = model.generate(ids, **options)
    assert torch.equal(skimp.generate(model, ids, max_new_tokens=40), want)
    set_tau(model, 1e9)
    other = model.generate(ids, **options)
    assert torch.equal(skimp.generate(model, ids, max_new_tokens=40), other)
    assert not torch.equal(other, want)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*max_length.*")
def test_the_same_call_gives_the_same_text(case, model):
    options, inputs = CASES[case], padded("left")
    decoder = TreeDecoder(model, target=HFTarget(model), prices=Given(lambda n: 1 + 1e-3 * n))
    want = model.generate(**inputs, **options, do_sample=False)
    assert torch.equal(decoder.generate(**inputs, **options), want)
    one = {k: v[:1] for k, v in inputs.items()}
    want = model.generate(**one, **options, do_sample=False)
    assert torch.equal(decoder.generate(one.pop("input_ids"), **one, **options), want)


def test_the_generated_step_is_used_and_kept(model):
    inputs = dict(input_ids=torch.tensor([[5, 9, 33, 2]]), max_new_tokens=40)
    want = model.generate(**inputs, do_sample=False)
    for _ in range(2):
        assert torch.equal(skimp.generate(model, **inputs), want)
        assert torch.equal(skimp.generate(model, **inputs, mode="plain"), want)
    config = transformers.GenerationConfig(max_new_tokens=5)
    got = skimp.generate(model, inputs["input_ids"], generation_config=config)
    assert torch.equal(got, want[:, :9])


def test_a_decoder_goes_with_its_model_and_not_into_a_copy():
    model = llama()
    skimp.generate(model, torch.tensor([[5, 9]]), max_new_tokens=2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    options = dict(input_ids=torch.tensor([[5, 9]]), max_new_tokens=6)
    want = other.generate(**options, do_sample=False)
    assert torch.equal(skimp.generate(other, **options), want)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_sampling_follows_torchs_seed(model):
    inputs = dict(input_ids=torch.tensor([[5, 9, 33]]), max_new_tokens=30, do_sample=True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(skimp.generate(model, **inputs, temperature=2.0, num_return_sequences=2))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].shape == (2, 33)
    assert not torch.equal(found[0][0], found[0][1])


class Told:
    def __init__(self):
        self.found, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.found += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_is_told_what_transformers_tells_it(model):
    inputs = dict(input_ids=torch.tensor([[5, 9, 33, 2]]), max_new_tokens=25)
    theirs, ours = Told(), Told()
    model.generate(**inputs, do_sample=False, streamer=theirs)
    skimp.generate(model, **inputs, streamer=ours)
    assert ours.found == theirs.found
    assert ours.ended


def test_what_trees_do_not_do_is_refused(model):
    ids = torch.tensor([[1, 2], [3, 4]])
    for options, message in (
        (dict(num_beams=4), "does not know num_beams"),
        (dict(logits_processor=[object()]), "does not know logits_processor"),
        (dict(min_new_tokens=3), "min_new_tokens"),
        (dict(max_length=2), "leave no room below max_length=2"),
        (dict(num_return_sequences=2), "unless do_sample"),
        (dict(streamer=Told()), "one row"),
        (dict(attention_mask=torch.zeros(2, 2)), "prompt 0 is empty"),
    ):
        with pytest.raises(SkimpError, match=message):
            skimp.generate(model, ids, **options)
    with pytest.raises(SkimpError, match="give input_ids"):
        skimp.generate(model)
    with pytest.raises(SkimpError, match="none of lambda"):
        skimp.generate(model, ids, mode="faster")
    with pytest.raises(SkimpError, match="drafter 'oracle' is none of"):
        skimp.generate(model, ids, draft="oracle")


def test_a_character_of_several_tokens_is_printed_whole():
    parts = "naïve 😀 ok".encode()

    def decode(tokens):
        return bytes(parts[t] for t in tokens).decode(errors="replace")

    told = []
    printer = Printer(decode, told.append)
    for i in range(len(parts)):
        printer([i])
    printer.end()
    assert "".join(told) == "naïve 😀 ok"
    assert "😀" in told
    cut = []
    printer = Printer(decode, cut.append)
    printer(list(range(9)))
    printer.end()
    assert "".join(cut).startswith("naïve ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(61)} | {"[UNK]": 61}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out)
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(out)
    return out


def command(*args, **more):
    typing = pytest.importorskip("typer.testing")
    from skimp.cli import app

    return typing.CliRunner().invoke(app, ["generate", *map(str, args)], **more)


def test_the_command(folder, model, tmp_path):
    want = model.generate(torch.tensor([[5, 9, 33]]), max_new_tokens=60, do_sample=False)
    text = " ".join(f"w{t}" for t in want[0, 3:].tolist())
    page = tmp_path / "tree.html"
    options = "--prompt", "w5 w9 w33", "--max-tokens", "60"
    got = command(folder, *options, "--tree", page)
    assert got.exit_code == 0, got.output
    assert got.stdout.strip() == text
    for word in ("tokens/s", "first token", "ms per step", "nodes per tree"):
        assert word in got.stderr
    assert "verified (solid)" in page.read_text()
    got = command(folder, "--json", "--mode", "eagle2", "--max-tokens", "60", input="w5 w9 w33")
    said = json.loads(got.stdout)
    assert said["texts"] == [text]
    assert said["report"]["tokens"] == 60
    got = command(folder, *options, "--prompt", "w1", "--mode", "cast", "--temperature", "0.8")
    assert got.stdout.count("\n") == 2


def test_the_command_says_what_is_wrong(folder):
    for args, message in (
        (("nowhere/at/all", "--prompt", "x"), "cannot be loaded"),
        ((folder, "--prompt", "x", "--dtype", "float8"), "none of float32"),
        ((folder, "--prompt", "x", "--top-p", "0"), "top_p outside"),
        ((folder, "--prompt", "x", "--draft", "model"), "needs a path"),
        ((folder, "--prompt", ""), "prompt 0 is empty"),
    ):
        got = command(*args)
        assert got.exit_code
        assert message in str(got.exception)
