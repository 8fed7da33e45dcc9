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


TEXT = tuple(
    " ".join(f"w{(5 * i * i + 3 * i * j + j * j) % 67}" for j in range(40)) for i in range(1, 41)
)
"""Passages; some words the tokenizer does not know."""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    monkeypatch.setattr(peers, "embedded_text", lambda: TEXT)
    return peers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Options that name a small encoder, converted, and a small decoder."""
    from skimp.passes.convert import prepare

    folder = tmp_path_factory.mktemp("models")
    known = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "<end>", *(f"w{i}" for i in range(61))])}
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
    example = dict(tokenizer(["w1 w2", "w3 w4"], return_tensors="pt"))
    gm, _ = prepare(encoder, example)
    skimp.save(gm, folder / "converted", example)
    return [
        f"--encoder={folder / 'encoder'}", f"--decoder={folder / 'decoder'}",
        f"--model={folder / 'converted'}", "--threads=1",
    ]  # fmt: skip


def run(peers, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--quick", "--json", *map(str, options)])
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        peers.main()
    finally:
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check_rows(rows, known, ran):
    """Every peer has a row; of those that did not run it says why."""
    rows = {r["name"]: r for r in rows}
    assert list(rows) == list(known)
    for name, row in rows.items():
        begins = ("does not apply", "not run" if row["version"] else "not installed: pip install")
        assert ("why" not in row) if name in ran else row["why"].startswith(begins), row
    return rows


def test_rows_of_an_encoder_and_a_run_that_goes_on(peers, tiny, tmp_path, monkeypatch, capsys):
    ran = ["skimp", "eager"]
    options = [*tiny, f"--folder={tmp_path}", "--only=encoder", "--peers", *ran]
    result = run(peers, monkeypatch, capsys, *options)
    rows = check_rows(result["encoder"], peers.PEERS, ran)
    assert rows["eager"]["quality"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert rows["HF generate"]["why"].startswith("does not apply")

    # only what is missing is measured again
    lost, kept = (tmp_path / "encoder" / n / "1 x 16.json" for n in ("eager", "skimp"))
    before = kept.read_bytes()
    lost.unlink()
    run(peers, monkeypatch, capsys, *options)
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


def decode(peers, tiny, folder, monkeypatch, capsys, ran):
    options = [*tiny, f"--folder={folder}", "--only=decoder", "--peers", *ran]
    result = run(peers, monkeypatch, capsys, *options)
    rows = check_rows(result["decoder"], peers.PEERS, ran)
    exact = [n for n in ran if rows[n]["precision"] == "float32"]
    for row in (rows[n] for n in exact):
        assert row["same"] + row["ties"] >= row["texts"] == 2
        wanted = pytest.approx(rows["HF generate"]["perplexity"], rel=1e-3)
        assert row["perplexity"] in (None, wanted)
    return rows


def test_texts_of_a_decoder(peers, tiny, tmp_path, monkeypatch, capsys):
    ran = ["skimp, trees", "HF generate", "eager"]
    rows = decode(peers, tiny, tmp_path, monkeypatch, capsys, ran)
    assert rows["eager"]["times"]["skimp, trees"]["prompts"] == 2
    assert rows["skimp, trees"]["perplexity"] is not None


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_all_that_is_installed(peers, tiny, tmp_path, monkeypatch, capsys):
    known = {n: p for n, p in peers.PEERS.items() if p.version and "llama" not in n}
    ran = [n for n in known if n != "skimp"]
    rows = decode(peers, tiny, tmp_path, monkeypatch, capsys, ran)
    assert rows["ONNX Runtime"]["perplexity"] is not None
    ran = [n for n in known if not peers.status(known[n], "encoder")]
    options = [*tiny, f"--folder={tmp_path}", "--only=encoder", "--peers", *ran]
    rows = check_rows(run(peers, monkeypatch, capsys, *options)["encoder"], peers.PEERS, ran)
    assert rows["ONNX Runtime"]["quality"]["cosine"] == pytest.approx(1, abs=1e-4)


def test_what_disagrees_is_not_timed(peers, tiny, tmp_path, monkeypatch, capsys):
    known = peers.PEERS
    monkeypatch.setitem(known, "eager", replace(known["eager"], tolerance=-1.0))
    options = [*tiny, f"--folder={tmp_path}", "--only=encoder", "--peers", "eager"]
    result = run(peers, monkeypatch, capsys, *options)
    row = next(r for r in result["encoder"] if r["name"] == "eager")
    assert row["why"].startswith("refused: eager: outputs differ by")
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
    assert capabilities.when(report).endswith(", 4 tests")
    assert capabilities.when(tmp_path / "none.xml") == ""
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
