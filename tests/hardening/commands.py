"""The commands that write, each at its smallest, killed at every change of a file.

    python tests/hardening/commands.py FOLDER [--most 40] [NAME ...]

Prints a line of JSON per command. It says in which state a command found its place and what was
left in it.
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

TESTS = Path(__file__).parent.parent
for folder in ("passes", "runtime", "export"):
    sys.path.append(str(TESTS / folder))
from moments import Command, attack  # noqa: E402

SMALL = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64
)
WORDS = [f"w{i}" for i in range(50)]


def dump(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


# -- choosing members -----------------------------------------------------------------------------


def traces(place):
    """A small member that is right where it agrees with itself, and a large one."""
    rows = []
    for i in range(120):
        votes = [str((i * k) % 9) if i % 3 == 0 else "7" for k in range(3)]
        small = {"samples": [{"text": v, "cost": 1e-5} for v in votes]}
        large = {"samples": [{"text": "7", "cost": 1e-3 * (1 + i % 5 / 10)}]}
        rows.append({"id": str(i), "members": {"small": small, "large": large}})
    dump(place / "t.jsonl", *rows)


def calibrate(place, value):
    budget = {"old": 2e-3, "new": 3e-3}[value]
    words = ["cascade", "calibrate", "--traces", "t.jsonl", "--alpha", 0.2, "-o", "p.json"]
    return [*words, "--budget", budget]


def policy_in(name):
    def seen(place):
        from skimp.runtime.cascade.policy import load_policy, read_record

        path = place / name
        if not path.exists():
            return None
        load_policy(path)
        return read_record(path)["sha256"]

    return seen


def questions(place):
    traces(place)
    asked = [
        {"id": str(i), "prompt": f"{'prove' if i % 3 else 'say'} {i} {i * 7}", "answer": "7"}
        for i in range(120)
    ]
    dump(place / "q.jsonl", *asked)


def train_router(place, value):
    words = ["router", "train", "--prompts", "q.jsonl", "--traces", "t.jsonl", "-o", "r.json"]
    words += ["--embed", "tfidf", "--members", "small:1,large:1"]
    return [*words, "--steps", 512, "--seed", ["old", "new"].index(value)]


def configured(place):
    member = {"url": os.environ["STUB"], "price": {"input": 1, "output": 2}, "retries": 0}
    (place / "c.yaml").write_text(json.dumps({"members": {"j": member}}))
    dump(place / "q.jsonl", *({"id": i, "prompt": f"n {i} j=ok:{i}"} for i in range(4)))
    pair = {"question": "Which? j=ok:[[A]]", "a": "x", "b": "y", "label": "A"}
    dump(place / "pairs.jsonl", *({"id": str(i), **pair} for i in range(3)))


def collect(place, value):
    limit = {"old": 2, "new": 4}[value]
    words = ["cascade", "collect", "c.yaml", "--prompts", "q.jsonl", "-o", "t.jsonl"]
    return [*words, "--limit", limit, "--at-once", 1]


def seen_traces(place):
    from skimp.runtime.cascade.collect import _done

    found = sorted(_done(place / "t.jsonl"))  # as the next run reads it
    return found or None


def judge(place, value):
    limit = {"old": 2, "new": 3}[value]
    words = ["judge", "pairs.jsonl", "--config", "c.yaml", "--judge", "j", "--limit", limit]
    return [*words, "-o", "v.jsonl", "--log", "log.json", "--responses", "seen.jsonl"]


def seen_judged(place):
    from skimp.runtime.cascade.judge import read_log
    from skimp.runtime.cascade.responses import ResponseCache

    ResponseCache(place / "seen.jsonl")
    if (place / "log.json").exists():
        assert read_log(place / "log.json")[0].status == "first"
    if not (place / "v.jsonl").exists():
        return None
    return [json.loads(x)["id"] for x in (place / "v.jsonl").read_text().splitlines()]


# -- costs ----------------------------------------------------------------------------------------


def sweep(place, value):
    levels = {"old": "1", "new": "1,2"}[value]
    words = ["economics", "sweep", "--url", os.environ["STUB"], "--model", "m", "--hourly", 1]
    return [*words, "--requests", 2, "--concurrency", levels, "-o", "s.json"]


def seen_sweep(place):
    from skimp.runtime.economics import measured_price, read_sweep

    whole_page(place / "s.html")
    if not (place / "s.json").exists():
        return None
    assert measured_price(place / "s.json").input > 0
    return [v.concurrency for v in read_sweep(place / "s.json")[1]]


def whole_page(path):
    if not path.exists():
        return None
    text = path.read_text()
    assert text.rstrip().endswith(("</html>", "</svg>")), f"half a page in {path}"
    return text


def points(place):
    for value, quality in (("old", 0.5), ("new", 0.7)):
        rows = [{"name": "a", "cost": 1.0, "quality": quality}, {"name": "b", "cost": 2.0}]
        (place / f"{value}.json").write_text(json.dumps([rows[0], rows[1] | {"quality": 0.8}]))


def frontier(place, value):
    return ["economics", "frontier", f"{value}.json", "-o", "f.html"]


# -- models ---------------------------------------------------------------------------------------


def dense(place):
    """An encoder and its tokenizer."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(**SMALL)).eval()
    model.save_pretrained(place / "dense")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (place / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    hf.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place / "dense")
    for value, first in (("old", 0), ("new", 1)):
        lines = (" ".join(WORDS[(first + i * k) % 50] for k in range(1, 9)) for i in range(40))
        (place / f"{value}.txt").write_text("\n".join(lines))
    return model


def encoder(place):
    dense(place)


def convert(place, value):
    """With every pass of the recipe, each in a few steps; called where nothing else runs."""
    from skimp.runtime import demo

    whole = demo.recipe
    brief = {"tokens": 500, "steps": 3}
    demo.recipe = lambda *given, **more: [
        replace(p, **{k: v for k, v in brief.items() if hasattr(p, k)})
        for p in whole(*given, **more)
    ]
    words = ["convert", "dense", "--text", f"{value}.txt", "--out", "model"]
    return [*words, "--budget", "flops <= 0.9"]


def convert_by_layer(place, value):
    return [*convert(place, value), "--offload", "files"]


def seen_converted(place):
    import skimp
    import transformers as hf
    from skimp.ir import artefact

    stages = place / "model-stages"
    if (stages / artefact.INDEX).exists():
        weights = stages / artefact.read_index(stages)["weights"]
        assert weights.stat().st_size
    folder = place / "model"
    if not (folder / artefact.INDEX).exists():
        return None
    skimp.load(folder, hf.AutoModel.from_pretrained(place / "dense"))
    return artefact.read_index(folder)["sha256"]


def sparse(place):
    """Two conversions of an encoder, told apart by their weights and thresholds."""
    import skimp
    from models import converted, ids

    model = dense(place)
    inputs = ids(most=50)
    for value, tau in (("old", 0.2), ("new", 0.4)):
        gm = converted(model, inputs, tau, expert_size=4, router_width=4)
        skimp.save(gm, place / value, inputs)
        for p in model.parameters():
            p.data.mul_(1.5)


def hub(place):
    import skimp
    from models import ids
    from skimp.passes.convert import prepare
    from skimp.passes.sparsify import Relufy
    from transformers import AutoTokenizer

    model, inputs = dense(place), ids(most=50)
    for value in ("old", "new"):
        gm, _ = prepare(model, inputs, expert_size=4, router_width=4)
        gm = Relufy().run(gm, None).gm
        tokenizer = AutoTokenizer.from_pretrained(place / "dense") if value == "new" else None
        skimp.save_pretrained(gm, model, place / value, inputs, tokenizer=tokenizer)
        for p in model.parameters():
            p.data.mul_(1.5)


def unconvert(place, value):
    return ["unconvert", value, "plain"]


def seen_plain(place):
    import transformers as hf

    if not (place / "plain" / "config.json").exists():
        return None
    model = hf.AutoModel.from_pretrained(place / "plain")
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def export(door, *more):
    def words(place, value):
        if door == "onnx":  # even these few weights lie beside it
            import skimp.codegen.onnx

            skimp.codegen.onnx.LARGE = 1000
        from skimp.runtime.export import suffix_of

        name = f"x{suffix_of(door)}"
        return ["export", value, "--model", "dense", "--to", door, "-o", name, *more]

    return words


def thresholds(values):
    return sorted(round(float(v), 4) for v in values)


def seen_folder(place):
    import skimp
    import transformers as hf
    from skimp.passes.lift import blocks

    if not (place / "x" / "skimp.json").exists():
        return None
    gm = skimp.load(place / "x", hf.AutoModel.from_pretrained(place / "dense"))
    return thresholds(b.tau for b in blocks(gm).values())


def seen_onnx(place):
    from models import ids
    from skimp.codegen.ort import Session, read

    path = place / "x.onnx"
    if not path.exists():
        return None
    library = place / "x.onnx.so"
    session = Session(path, native=library.exists(), library=library)
    assert session(**ids(most=50))
    held = {p.key: p.value for p in read(path).metadata_props}
    return held["skimp.sha256"] + held["skimp.taus"]


def seen_pt2(place):
    import skimp
    from models import ids

    path = place / "x.pt2"
    if not path.exists():
        return None
    outputs = skimp.load(path)(**ids(most=50))
    return round(sum(float(v.double().abs().sum()) for v in outputs.values()), 3)


def seen_iree(place):
    import skimp
    from models import ids

    path = place / "x.vmfb"
    if not path.exists():
        return None
    outputs = skimp.load(path)(**ids(most=50))
    return round(sum(float(v.double().abs().sum()) for v in outputs.values()), 3)


def seen_mlir(place):
    """Each file by itself, as a compiler reads one of them."""
    import hashlib

    paths = [place / "x.mlir", place / "x.raw.mlir"]
    for path in (p for p in paths if p.exists()):
        assert path.read_text().rstrip().endswith("}"), f"half a module in {path}"
    if not paths[0].exists():
        return None
    return hashlib.sha256(paths[0].read_bytes()).hexdigest()


# -- decoders and U-Nets --------------------------------------------------------------------------


def decoder(place):
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=300)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    config = hf.LlamaConfig(**sizes, **heads, eos_token_id=None, pad_token_id=0)
    hf.LlamaForCausalLM(config).save_pretrained(place / "decoder")
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(300)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="2")
    fast.save_pretrained(place / "decoder")
    (place / "prompts.txt").write_text("\n".join(f"{i} {i + 7} 9" for i in range(24)))


def train_drafter(place, value):
    words = ["train-drafter", "decoder", "--out", f"{value}-head", "--prompts", "prompts.txt"]
    return [*words, "--minutes", 0.02]


def seen_heads(place):
    from skimp.runtime.models import load_decoder
    from skimp.runtime.tree.fused import FusedTarget
    from skimp.runtime.tree.head import Head

    target = FusedTarget(load_decoder(str(place / "decoder")).model)
    found = [v for v in ("old", "new") if (place / f"{v}-head" / "head.safetensors").exists()]
    for value in found:
        Head.load(place / f"{value}-head", target)
    return found[-1] if found else None


def generate(place, value):
    prompt = {"old": "5 6 7 5 6 7 5", "new": "8 9 8 9 8"}[value]
    words = ["generate", "decoder", "--prompt", prompt, "--max-tokens", 24, "--mode", "eagle2"]
    return [*words, "--tree", "tree.html"]


def unet(place):
    import torch
    from test_unet_train import pictures
    from unets import two

    torch.manual_seed(0)
    two(in_channels=3, out_channels=3).save_pretrained(place / "pipe" / "unet")
    pictures().save(place / "few.safetensors")


def prune(place, value):
    remove = {"old": ["--remove", "mid_block"], "new": ["--preset", "koala-700m"]}[value]
    return ["prune-unet", "pipe", *remove, "-o", "student"]


def seen_student(place):
    from skimp.passes.unet_distill import DistillUNet
    from skimp.runtime.unet import load_unet
    from skimp.runtime.unet_store import read_pairs

    if not (place / "student" / "config.json").exists():
        return None
    taps = read_pairs(place / "student", DistillUNet())
    student = load_unet(str(place / "student"))
    inside = dict(student.named_modules())
    assert all(name in inside for name in taps), "taps of another student"
    return sum(p.numel() for p in student.parameters())


def student(place):
    from moments import child, run

    unet(place)
    child(run, COMMANDS["prune-unet"], place, "new")


def distill(place, value):
    words = ["distill-unet", "pipe", "student", "--data", "few.safetensors", "--batch", 2]
    words += ["--lr", 1e-2, "--steps", {"old": 1, "new": 2}[value], "--every", 1]
    return [*words, "-o", "distilled"]


def seen_distilled(place):
    from skimp.runtime.unet import load_unet

    if not (place / "distilled" / "unet" / "config.json").exists():
        return None
    model = load_unet(str(place / "distilled"))
    return round(float(sum(p.detach().double().abs().sum() for p in model.parameters())), 6)


PAGE = ("matplotlib.figure", "matplotlib.backends.backend_svg")
SERVING = ("skimp.runtime.cascade.build", "openai")
MODELS = ("transformers.models.bert.modeling_bert", "torch._dynamo", "skimp.runtime.hub.quantizer")
DECODERS = ("transformers.models.llama.modeling_llama", "torch._dynamo")
UNETS = ("diffusers.models.unets.unet_2d_condition", "torch._dynamo", "test_unet_train")
ONNX = ("onnx", "onnxruntime", "onnxscript", "torch.onnx")

COMMANDS = {
    c.name: c
    for c in (
        Command("calibrate", traces, calibrate, policy_in("p.json")),
        Command("frontier", points, frontier, lambda p: whole_page(p / "f.html"), imports=PAGE),
        Command("collect", configured, collect, seen_traces, grows=True, imports=SERVING),
        Command("judge", configured, judge, seen_judged, imports=SERVING),
        Command("sweep", Path.exists, sweep, seen_sweep, grows=True, imports=(*SERVING, *PAGE)),
        Command("router", questions, train_router, policy_in("r.json"), imports=("sb3_contrib",)),
        Command("unconvert", hub, unconvert, seen_plain, gap=True, imports=MODELS),
        Command("safetensors", sparse, export("safetensors"), seen_folder, imports=MODELS),
        Command("onnx", sparse, export("onnx", "--native"), seen_onnx, imports=(*MODELS, *ONNX)),
        Command("mlir", sparse, export("mlir"), seen_mlir, imports=(*MODELS, "torch_mlir")),
        Command("iree", sparse, export("iree"), seen_iree, imports=(*MODELS, "torch_mlir")),
        Command("pt2", sparse, export("pt2"), seen_pt2, imports=MODELS),
        Command("convert", encoder, convert, seen_converted, imports=MODELS),
        Command("convert-by-layer", encoder, convert_by_layer, seen_converted, imports=MODELS),
        Command("train-drafter", decoder, train_drafter, seen_heads, imports=DECODERS),
        Command(
            "generate", decoder, generate, lambda p: whole_page(p / "tree.html"), imports=DECODERS
        ),
        Command("prune-unet", unet, prune, seen_student, gap=True, imports=UNETS),
        Command("distill-unet", student, distill, seen_distilled, gap=True, imports=UNETS),
    )
}


@contextmanager
def ready(names):
    """What the commands of these names need, in this process and around it; yields them."""
    import skimp.cli  # noqa: F401  # once for all forks

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in names:
        for module in COMMANDS[name].imports:
            import_module(module)
    if "pt2" in names:
        # asks the compiler and a process of its own what the processor can do, in each fork anew
        import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()
    words = [sys.executable, TESTS / "runtime" / "cascade" / "stub.py"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as stub:
        os.environ["STUB"] = stub.stdout.readline().strip()
        try:
            yield [COMMANDS[name] for name in names]
        finally:
            stub.terminate()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, help="moments of each, spread over all there are")
    parser.add_argument("names", nargs="*", help="of: " + ", ".join(COMMANDS))
    args = parser.parse_args()
    with ready(args.names or list(COMMANDS)) as commands:
        for command in commands:
            found = attack(command, args.folder.absolute(), args.most)
            print(json.dumps({command.name: found}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
