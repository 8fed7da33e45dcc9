"""The peer table: rows for all, nothing timed that disagrees, claims from tests that ran."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import skimp
import torch

hf = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("onnxruntime")
pytest.importorskip("typer")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(BENCHMARKS))
    import peers

    yield peers
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Options that name a small encoder, converted, and a small decoder."""
    from skimp.passes.convert import prepare
    from skimp.passes.data import embedded_text

    folder = tmp_path_factory.mktemp("models")
    words = dict.fromkeys(w for text in embedded_text()[:60] for w in text.split())
    known = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "<end>", *list(words)[:61]])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    encoder = hf.BertModel(hf.BertConfig(**TINY)).eval()
    decoder = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, head_dim=8, num_key_value_heads=2)).eval()
    for name, model in (("encoder", encoder), ("decoder", decoder)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    example = dict(tokenizer(["the of", "a to"], return_tensors="pt"))
    gm, _ = prepare(encoder, example)
    skimp.save(gm, folder / "converted", example)
    return [
        f"--encoder={folder / 'encoder'}", f"--decoder={folder / 'decoder'}",
        f"--model={folder / 'converted'}", "--threads=1",
    ]  # fmt: skip


FEW = ["--peers", "skimp", "skimp, trees", "HF generate", "eager", "ONNX Runtime"]
"""Those that need no minute of compiling."""


def run(peers, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--quick", "--json", *map(str, options)])
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        peers.main()
    finally:
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_row_for_every_peer_and_a_run_that_goes_on(peers, tiny, tmp_path, monkeypatch, capsys):
    options = [*tiny, f"--folder={tmp_path}", *FEW]
    result = run(peers, monkeypatch, capsys, *options)
    for kind in ("encoder", "decoder"):
        rows = {r["name"]: r for r in result[kind]}
        assert list(rows) == list(peers.PEERS)
        for name in ("eager", "ONNX Runtime"):
            assert "why" not in rows[name], rows[name]
        for name in set(rows) - set(FEW):
            begins = "not run" if rows[name]["version"] else "not installed: pip install"
            assert rows[name]["why"].startswith((begins, "does not apply"))
    encoder = {r["name"]: r for r in result["encoder"]}
    assert encoder["ONNX Runtime"]["quality"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert encoder["HF generate"]["why"].startswith("does not apply")
    decoder = {r["name"]: r for r in result["decoder"]}
    for name in ("skimp, trees", "eager", "ONNX Runtime"):
        assert decoder[name]["same"] + decoder[name]["ties"] >= decoder[name]["texts"] == 2
    wanted = decoder["HF generate"]["perplexity"]
    for name in ("skimp, trees", "ONNX Runtime"):
        assert decoder[name]["perplexity"] == pytest.approx(wanted, rel=1e-3)

    # only what is missing is measured again
    lost = tmp_path / "encoder" / "ONNX Runtime" / "1 x 16.json"
    kept = tmp_path / "encoder" / "eager" / "1 x 16.json"
    before = kept.read_bytes()
    lost.unlink()
    run(peers, monkeypatch, capsys, *options, "--only=encoder")
    assert lost.exists()
    assert kept.read_bytes() == before

    page = tmp_path / "peers.md"
    peers.write_page(result, page)
    text = page.read_text()
    assert all(f"| {name} |" in text for name in peers.PEERS)
    assert text.count("**Faster than skimp:**") == 2

    # another machine's figures are not mixed with these
    about = tmp_path / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"machine": "another"}))
    with pytest.raises(skimp.SkimpError, match="take another"):
        run(peers, monkeypatch, capsys, *options)


def test_what_disagrees_is_not_timed(peers, tiny, tmp_path, monkeypatch, capsys):
    known = peers.PEERS
    strict = replace(known["ONNX Runtime"], tolerance=0.0)
    monkeypatch.setitem(known, "ONNX Runtime", strict)
    options = [*tiny, f"--folder={tmp_path}", "--only=encoder", "--peers", "ONNX Runtime"]
    result = run(peers, monkeypatch, capsys, *options)
    row = next(r for r in result["encoder"] if r["name"] == "ONNX Runtime")
    assert row["why"].startswith("refused: ONNX Runtime: outputs differ by")
    assert "shapes" not in row


def test_claims_are_read_from_tests_that_ran(peers, tmp_path):
    import capabilities

    assert capabilities.unknown() == []
    claims = {"a": (("no.py", "runtime/test_peers.py::test_gone"), None)}
    assert capabilities.unknown(claims) == list(claims["a"][0])

    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_good(n): pass\n"
        "def test_bad(): assert False\n"
        "def test_absent(): pytest.skip('no GPU')\n"
    )
    report = tmp_path / "tests.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--junitxml={report}"],
        cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    found = capabilities.outcomes(report)
    said = {
        test: capabilities.verdict((f"test_some.py{test}",), found)
        for test in ("", "::test_good", "::test_bad", "::test_absent", "::test_gone")
    }
    assert said["::test_good"] == ("yes", 2)
    assert said["::test_bad"] == ("failure in `test_some.py::test_bad`", 0)
    assert said[""][0] == "failure in `test_some.py`"
    assert said["::test_absent"][0].startswith("skipped")
    assert said["::test_gone"][0].startswith("not run")
    assert capabilities.verdict((), found) == ("no", 0)
