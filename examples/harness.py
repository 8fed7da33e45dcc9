"""Evaluate a converted language model with lm-evaluation-harness, offline, on a small local task.

The task is the last word of passages that every Python carries; any task of the harness can stand
in its place where there is a network. Needs `pip install 'skimp[eval]'` and a folder written by
`skimp.save_pretrained`:

    .venv/bin/python examples/harness.py FOLDER --tau 0 0.05 0.1
"""

import argparse
import json
import tempfile
from pathlib import Path

import skimp
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from skimp.passes.lift import blocks
from transformers import AutoModelForCausalLM, AutoTokenizer


def last_words(folder, count):
    """A task of the harness: how likely, and how often first choice, the last word is."""
    passages = [p.rstrip(".").rpartition(" ") for p in skimp.embedded_text(80, 300)[:count]]
    lines = [json.dumps({"start": p[0], "word": p[2]}) for p in passages]
    path = Path(folder) / "last_words.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return {
        "task": "last_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{start}}",
        "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }


def evaluate(model, tokenizer, tasks, batch_size=8):
    """The harness's figures by task."""
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return simple_evaluate(model=wrapped, tasks=tasks, log_samples=False, bootstrap_iters=0)[
        "results"
    ]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what skimp.save_pretrained wrote")
    parser.add_argument("--tau", type=float, nargs="*", default=[], help="thresholds to try")
    parser.add_argument("--passages", type=int, default=200)
    args = parser.parse_args(arguments)
    model = AutoModelForCausalLM.from_pretrained(args.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        task = last_words(folder, args.passages)
        for tau in args.tau or [None]:
            if tau is not None:
                skimp.set_tau(model, tau)
            result = evaluate(model, tokenizer, [task])["last_words"]
            name = "as saved" if tau is None else f"tau {tau}"
            found[name] = {k.split(",")[0]: v for k, v in result.items() if k.endswith(",none")}
            print(f"{name}: {found[name]}")
    print(f"{len(blocks(model))} blocks ran")
    return found


if __name__ == "__main__":
    main()
