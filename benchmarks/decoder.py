"""SmolLM2-135M made sparse within a time budget: perplexity against FLOPs, and decode speed.

By default the gate of each network is its router, which needs no training and then gets as much as
--minutes says; with --router learned, neurons are grouped into experts and routers trained.

Label-free: the loss is the divergence from the dense model's next tokens, on text that Python
carries, or, with --sampled, that the model writes itself first. Start it again with the same
arguments and it goes on after the last finished pass. Perplexity is of WikiText-2 (validation), in
windows without overlap. Decoding is one token at a time, batch of one: through torch.compile, with
a static key-value cache, and by the step that skimp generates for decoders; runs are interleaved in
this process. On a GPU (--device cuda) it trains and measures perplexity, no speed.
"""

import argparse
import copy
import json
import os
import time
from itertools import zip_longest
from pathlib import Path

import torch
from decoder_page import write_page
from skimp.ir.cost import write_atomically
from skimp.ir.measure import agree, compare, machine
from skimp.passes.base import Context, kl_divergence, next_tokens
from skimp.passes.budget import Budget, set_tau, taus_at
from skimp.passes.convert import convert
from skimp.passes.data import embedded_text, on_device
from skimp.passes.gate_route import GateRoute
from skimp.passes.lift import blocks
from skimp.passes.project import Project
from skimp.passes.quality import evaluate, whole_model_flops
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from skimp.runtime.language import best_neurons, perplexity, sampled, wikitext2, windows
from skimp.runtime.models import DECODER, load_pretrained
from skimp.runtime.tree.fused import FusedTarget

ROOT = Path(__file__).parents[1]
SHARES = {
    "gate": (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 1.0),
    "learned": (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0),
}
FEW = {"gate": (0.5, 0.6, 0.65, 0.7, 0.8), "learned": (0.7, 0.8, 0.85, 0.9, 0.95, 1.0)}


def passes(args):
    """The recipe, its training bounded by the budget of time."""
    seconds = 60 * args.minutes
    if args.router == "gate":
        return [GateRoute(), *([recovery(args, 0.95 * seconds)] if seconds else [])]
    project = 0.15 if args.projections else 0.0
    sparsify = 0.3 if args.alpha else 0.0
    recover = 0.8 - project - sparsify
    sparsified = Sparsify(
        tokens=10**9,
        seconds=sparsify * seconds,
        chunk=args.chunk,
        batch=args.rows,
        alpha=args.alpha,
        clamp=None if args.relufy else -10.0,
    )
    return [
        *([Project(tokens=10**9, seconds=project * seconds)] if args.projections else []),
        *([Relufy()] if args.relufy else []),
        *([sparsified] if args.alpha else []),
        Split(rows=min(args.chunk, 8192)),
        Route(tokens=args.chunk, steps=args.route, relative=True),
        recovery(args, recover * seconds),
        Budget(f"flops <= {args.share + 0.1:.2f}"),
    ]


def recovery(args, seconds):
    """Training while only some of the experts run."""
    return Recover(
        share=args.share,
        steps=10**6,
        seconds=seconds,
        segments=args.segments,
        jitter=args.jitter,
        lr=args.lr,
        relative=True,
    )


def frontier(done, context, text, kinds, log):
    """Perplexity of the dense model, of perfect neuron selection, and of converted ones.

    Args:
        done: A conversion, for its teacher.
        context: Of held-out data.
        text: What perplexity is of.
        kinds: By name a model, shares of its experts, and whether the same share runs in every
            block; else they are allotted to blocks by what each loses.
        log: Told of each row.
    """
    rows = []

    def add(kind, share, flops, whole, ppl, kl=None):
        rows.append(dict(kind=kind, share=share, ffn=flops, whole=whole, perplexity=ppl, kl=kl))
        log(f"{kind:14} share {share:.2f}  FLOPs {flops:.3f} ({whole:.3f})  perplexity {ppl:.2f}")

    with torch.no_grad():
        add("dense", 1.0, 1.0, 1.0, perplexity(done.teacher, text), 0.0)
        for share in (0.5, 0.7):
            with best_neurons(done.teacher, share):
                # a bound: choosing is not counted, and there is no cheap way to choose so
                add("best neurons", share, share, float("nan"), perplexity(done.teacher, text))
        batch = context.held_out[0]
        for kind, (model, chosen, even) in kinds.items():
            for share, taus in zip(chosen, taus_at(model, context, chosen, even=even), strict=True):
                set_tau(model, taus)
                quality = evaluate(model, context, context.held_out)
                whole = whole_model_flops(done.teacher, model, batch, quality.experts)
                ppl = perplexity(model, text)
                add(kind, share, quality.flops, whole["whole_share"], ppl, quality.distance)
    return rows


def grafted(model, gm):
    """The model with its cache, its networks replaced by the blocks of a graph."""
    model = copy.deepcopy(model)
    for name, block in blocks(gm).items():
        model.set_submodule(name.removesuffix(".dynk"), block)
    return model


def decoder(model, prompt, backend):
    """A call that decodes one token after the prompt, always the same one."""
    from transformers import StaticCache

    length = prompt.shape[1] - 1
    cache = StaticCache(config=model.config, max_cache_len=2 * length)
    model(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True)
    last = prompt[:, -1:].contiguous()
    fast = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)

    def step():
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)
        return fast(input_ids=last, past_key_values=cache, use_cache=True).logits

    return step


def last(model, prompt):
    """Logits of the last token, by the model itself."""
    return model(input_ids=prompt).logits[:, -1:]


def generated(model, prompt):
    """The same by the step that is generated for decoding, which only some models have."""
    target = FusedTarget(model)
    target.prefill([prompt[0, :-1].tolist()])
    token, parent = prompt[0, -1:].clone(), torch.tensor([-1])
    return lambda: target.verify([token], [parent])[0][None]


def decode_speed(model, done, prompt, share, context, seconds):
    """Tokens per second of the converted model, and of the dense one, compiled every way.

    Nothing is timed that computes something else. Over a long prompt some gates lie within rounding
    of their threshold, and the model itself differs in float64; so what leaves neurons out is held
    to it on the whole prompt at tau = 0, and on the prompt's beginning at what is timed.
    """
    taus = taus_at(done.model, context, [share])[0]
    converted, dense = grafted(model, done.model), grafted(model, done.teacher)
    makers = {
        "dense, Inductor": lambda ids: decoder(model, ids, "inductor"),
        "dense, skimp": lambda ids: decoder(dense, ids, "skimp"),
        "converted, skimp": lambda ids: decoder(converted, ids, "skimp"),
    }
    subject = "converted, skimp"
    if all(block.gate_routed for block in blocks(done.model).values()):
        makers["dense, generated step"] = lambda ids: generated(model, ids)
        makers[subject := "converted, generated step"] = lambda ids: generated(converted, ids)
    with torch.no_grad():
        set_tau(done.model, 0.0)
        for name, make in makers.items():
            own = model if name.startswith("dense") else converted
            agree(make(prompt)(), last(own, prompt), name, 1e-3)
        set_tau(done.model, taus)
        for name in (n for n in makers if n.startswith("converted")):
            agree(makers[name](prompt[:, :17])(), last(converted, prompt[:, :17]), name, 1e-3)
        calls = {name: make(prompt) for name, make in makers.items()}
    result = compare(calls, subject, seconds=seconds)
    rate = {n: 1 / t.median for n, t in result.timings.items()}
    return {"share": share, "tokens_per_second": rate, **result.as_dict()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", choices=("gate", "learned"), default="gate")
    parser.add_argument("--minutes", type=float, default=60, help="of training, in all")
    parser.add_argument("--folder", type=Path, default=Path("out/decoder"))
    parser.add_argument("--projections", action="store_true")
    parser.add_argument("--relufy", action="store_true", help="ReLU in place of SiLU")
    parser.add_argument("--share", type=float, default=0.6, help="of experts, to recover at")
    parser.add_argument("--alpha", type=float, default=0.0, help="Hoyer's weight; 0: no such pass")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak, of recovery")
    parser.add_argument("--jitter", type=float, default=0.2)
    parser.add_argument("--route", type=int, default=1500, help="steps of each router")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sampled", type=int, default=0, help="tokens that the model writes")
    parser.add_argument("--batch", type=int, default=4, help="windows of 256 tokens")
    parser.add_argument("--expert-size", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=24_576, help="tokens held in memory")
    parser.add_argument("--rows", type=int, default=512, help="per step of layer-wise distillation")
    parser.add_argument("--segments", type=int, default=1, help="gradient checkpointing")
    parser.add_argument("--eval-tokens", type=int, default=32_768)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--speed", action="store_true", help="only time decoding, at --share")
    parser.add_argument("--quick", action="store_true", help="fewer shares and repeats")
    parser.add_argument("--out", type=Path, help="by default in benchmarks/results")
    parser.add_argument("--page", action="store_true", help="only write docs/decoder.md again")
    args = parser.parse_args()
    results = {
        "speed": ROOT / "benchmarks/results/decoder-speed.json",
        "gate": ROOT / "benchmarks/results/decoder.json",
        "learned": ROOT / "benchmarks/results/decoder-learned.json",
    }
    if args.page:
        return write_page(results)

    def log(text):
        if not args.json:
            print(text, flush=True)

    last = [0.0]

    def progress(stage, finished, total, note=""):
        if finished in (0, total) or time.monotonic() > last[0] + 20:
            last[0] = time.monotonic()
            log(f"{stage} {finished / total:.0%} {note}")

    loaded = load_pretrained(DECODER)
    device = torch.device(args.device)
    model = loaded.model.to(device)
    data = windows(loaded.tokenizer, embedded_text(), length=256, batch=args.batch)
    if args.sampled:
        begin = time.monotonic()
        with torch.autocast(device.type, torch.bfloat16):
            own = sampled(model, loaded.tokenizer, args.sampled, batch=args.batch)
        log(f"{args.sampled} tokens sampled in {time.monotonic() - begin:.0f} s")
        data = [b for pair in zip_longest(own, data) for b in pair if b is not None]
    few = max(2, (2 if args.quick else 32) // args.batch)
    held, train = data[:few], data[few:]
    length = 512
    text = windows(loaded.tokenizer, [wikitext2(8 * args.eval_tokens)], length=length, batch=2)
    text = on_device(text[: max(1, args.eval_tokens // (2 * length))], device)
    start = time.monotonic()

    def made(steps, folder):
        return convert(
            model, train, held_out=held, passes=steps, expert_size=args.expert_size,
            projections=args.projections, folder=folder, progress=progress,
        )  # fmt: skip

    done = made(passes(args), args.folder / args.router)
    trained = time.monotonic() - start
    shares = (FEW if args.quick else SHARES)[args.router]
    kinds = {"converted": (done.model, shares, True)}
    if args.router == "gate" and args.minutes and not args.speed:
        untrained = made([GateRoute()], args.folder / "untrained").model
        kinds = {"untrained": (untrained, FEW["gate"], True), **kinds}
    kinds["allotted"] = (done.model, (0.6 if args.router == "gate" else 0.9,), False)
    held = on_device(held, device)
    context = Context(done.teacher, held, held, next_tokens, distance=kl_divergence)
    rows, best = [], None
    if not args.speed:
        rows = frontier(done, context, text, kinds, log)
        most = 1.05 * rows[0]["perplexity"]
        good = [r for r in rows if r["kind"] == "converted" and r["perplexity"] <= most]
        best = min(good, key=lambda r: r["ffn"], default=None)
    share = best["share"] if best else args.share
    prompt, speed = text[0]["input_ids"][:1, :129], None
    if device.type == "cpu":
        speed = decode_speed(loaded.model, done, prompt, share, context, 5 if args.quick else 30)
        for name, rate in speed["tokens_per_second"].items():
            log(f"{name:18} {rate:6.1f} tokens/s")
    result = {
        "model": DECODER,
        "router": args.router,
        "minutes": args.minutes,
        "options": {k: str(v) for k, v in vars(args).items()},
        "seconds_of_this_run": round(trained, 1),
        "text": {"tokens": sum(b["input_ids"].numel() for b in text), "window": length},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "frontier": rows,
        "within_5_percent": best,
        "decode": speed,
        "load": os.getloadavg()[0],
        "history": done.history,
    }
    written = args.out or results["speed" if args.speed else args.router]
    write_atomically(written, json.dumps(result, indent=1).encode())
    if args.out is None:
        write_page(results)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
