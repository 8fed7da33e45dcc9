"""lm-evaluation-harness on a converted model, offline."""

import importlib.util
import math
import os
from pathlib import Path

import pytest
import skimp
import torch
from skimp.passes.convert import prepare
from skimp.passes.lift import blocks
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"
hf = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")


def example():
    path = Path(__file__).parents[2] / "examples" / "harness.py"
    spec = importlib.util.spec_from_file_location("harness_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(i): i - 30 for i in range(32, 127)} | {"<pad>": 0, "<eos>": 1}
    tokens = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<eos>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 90, (2, 12))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    gm, _ = prepare(model, inputs, expert_size=4, router_width=4)
    for b in blocks(gm).values():
        b.act = "relu"
    skimp.set_tau(gm, 0.5)
    root = tmp_path_factory.mktemp("lm") / "model"
    skimp.save_pretrained(gm, model, root, inputs, tokenizer=tokenizer)
    return root


def test_the_figures_are_the_models_own(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    harness = example()
    found = harness.main([str(folder), "--passages", "12", "--tau", "0", "0.9"])
    assert set(found) == {"tau 0.0", "tau 0.9"}
    assert found["tau 0.0"]["perplexity"] != found["tau 0.9"]["perplexity"]
    # by hand: the perplexity of the last words
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    skimp.set_tau(model, 0.9)
    total, right = [], []
    for passage in skimp.embedded_text(80, 300)[:12]:
        start, _, word = passage.rstrip(".").rpartition(" ")
        before = tokenizer(start)["input_ids"]
        ids = torch.tensor([before + tokenizer(" " + word)["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(before) - 1 : -1]
        wanted = ids[0, len(before) :]
        total.append(-float(F.cross_entropy(logits, wanted, reduction="sum")))
        right.append(bool((logits.argmax(-1) == wanted).all()))
    assert found["tau 0.9"]["perplexity"] == pytest.approx(math.exp(-sum(total) / 12), rel=1e-3)
    assert found["tau 0.9"]["acc"] == pytest.approx(sum(right) / 12)
