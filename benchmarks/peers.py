"""The encoder and the decoder by skimp and by its peers: quality and speed; writes docs/peers.md.

Every peer runs the same weights on the same inputs at the same threads, at its best setting, warm,
in turn with the others. Nothing is timed whose outputs disagree with the model that it runs: it
gets a row that says by how much. Results are a file per peer and shape in --folder, so that the run
may be stopped, and goes on where it was; a peer installed later is timed beside skimp alone, and
the rest stays. Needs a converted encoder: `make demo` leaves one in out/model.

    python benchmarks/peers.py             # ten minutes; on a machine that does nothing else
    python benchmarks/peers.py --quick     # what this machine can run, not how fast it is
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import torch
from capabilities import read_tests, run_tests, when
from decode import check, prompts
from peers_decoder import OWN_TEXT, REFERENCE, Decoder
from peers_encoder import QUALITY_SHAPE, Encoder
from peers_known import PEERS, status
from peers_page import result_of, write_page
from skimp.cli_console import progress
from skimp.ir.cost import write_atomically
from skimp.ir.errors import SkimpError, VerificationError
from skimp.ir.measure import agree, compare, machine
from skimp.passes.data import embedded_text
from skimp.runtime.demo import SHAPES
from skimp.runtime.language import wikitext2, windows
from skimp.runtime.models import DECODER, DEFAULT, load_decoder, load_pretrained
from skimp.runtime.store import load

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/peers.json", ROOT / "docs/peers.md"
LONGEST = 400
"""Prompts of more tokens are left out: each size of a static cache costs a compilation."""

REST = 0.2
"""Seconds before each turn: idle threads of ONNX Runtime and of llama.cpp spin for a while."""


class Records:
    """What is known of peers as they are installed, a file each: ``KIND/PEER/WHAT.json``."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "about.json"
        here = dict(machine=machine(), torch=torch.__version__)
        if about.exists() and (there := json.loads(about.read_text())) != here:
            raise SkimpError(f"{folder} holds figures of {there}, this is {here}: take another")
        write_atomically(about, json.dumps(here).encode())

    def put(self, kind, name, what, value):
        """Keep a record, with the version and how busy the machine was."""
        value = dict(version=PEERS[name].version, load=os.getloadavg()[0], **value)
        write_atomically(self.folder / kind / name / f"{what}.json", json.dumps(value).encode())

    def refuse(self, kind, name, error):
        """Keep why a peer is not timed."""
        self.put(kind, name, "refused", dict(why=str(error)))

    def read(self, kind, name):
        """By what they are of; other versions are as if they were not there."""
        found = {}
        for path in sorted((self.folder / kind / name).glob("*.json")):
            record = json.loads(path.read_text())
            if record["version"] == PEERS[name].version:
                found[path.stem] = record
        return found

    def lacking(self, kind, names, *what):
        """Names of which one of these is not known; of a peer that was refused, all is."""
        known = {name: self.read(kind, name) for name in names}
        return [n for n, r in known.items() if "refused" not in r and not set(what) <= set(r)]


def run_encoder(args, records, names, log, told):
    loaded = load_pretrained(args.encoder)
    text = embedded_text()[: args.passages]
    bench = Encoder(loaded, load(args.model, loaded.model), text, args.folder)
    shapes = SHAPES[:1] if args.quick else SHAPES
    for done, shape in enumerate(shapes):
        told("encoder", done, len(shapes))
        what = "{} x {}".format(*shape)
        rated = shape == (shapes[0] if args.quick else QUALITY_SHAPE)
        todo = records.lacking("encoder", names, what, *["quality"] * rated)
        if not todo:
            continue
        inputs = bench.inputs(*shape)
        ways = bench.ways(dict.fromkeys([*todo, "skimp"]))
        for name in list(ways):
            try:
                got = ways[name](inputs)
                agree(got, bench.wanted(name, inputs), name, PEERS[name].tolerance)
            except VerificationError as error:
                if name == "skimp":
                    raise  # nothing to compare with
                records.refuse("encoder", name, error)
                log(f"refused: {error}")
                del ways[name]
        if rated:
            for name, quality in bench.quality(ways, shape).items():
                records.put("encoder", name, "quality", quality)
        calls = {name: partial(way, inputs) for name, way in ways.items()}
        # a call should find its own caches; one of a large shape fills them while it runs
        warm = 1 if shape[0] * shape[1] > 256 else 3
        length = dict(seconds=0.2, least=2) if args.quick else dict(seconds=args.seconds, least=5)
        found = compare(calls, "skimp", rest=REST, warm=warm, **length).as_dict()
        for name in (n for n in ways if n in todo):
            one = dict(timing=found["timings"][name], speedup=found["speedup"].get(name))
            records.put("encoder", name, what, one)
            log(f"encoder {what:8} {name:18} {1e3 * one['timing']['median']:8.1f} ms")
    told("encoder", len(shapes), len(shapes))


def texts(args, tokenizer):
    """Prompts by name, and windows of one text each for perplexity."""
    if args.quick:
        plain = embedded_text()[:200]
        ids = tokenizer(list(plain[:2]))["input_ids"]
        return {f"text-{i}": row[:24] for i, row in enumerate(ids)}, windows(
            tokenizer, plain, length=32, batch=1
        )[:2]
    found = prompts(tokenizer, 3)
    found = {name: ids for name, ids in found.items() if len(ids) <= LONGEST}
    held = windows(tokenizer, [wikitext2(20_000)], length=256, batch=1)
    return dict(list(found.items())[: args.prompts]), held[: args.windows]


def run_decoder(args, records, names, log, told):
    loaded = load_decoder(args.decoder)
    folder = records.folder / "decoder"
    bench = Decoder(loaded, args.tokens, args.folder, log)
    found, held = texts(args, loaded.tokenizer)
    names = list(dict.fromkeys([*names, REFERENCE]))
    todo = records.lacking("decoder", names, "perplexity", *found)
    for done, name in enumerate(todo):
        told("warm", done, len(todo))
        bench.warm(name)
        if "perplexity" not in records.read("decoder", name):
            value = bench.perplexity(name, held)
            records.put("decoder", name, "perplexity", dict(value=value, windows=len(held)))
    told("warm", len(todo), len(todo))
    for name in todo:
        value, wanted = (
            records.read("decoder", n)["perplexity"]["value"] for n in (name, REFERENCE)
        )
        if value is not None and not value / wanted - 1 <= PEERS[name].tolerance:
            records.refuse("decoder", name, f"perplexity {value:.2f}, not {wanted:.2f}")
            log(f"refused: {name} has a perplexity of {value:.2f}, not {wanted:.2f}")
    references = dict.fromkeys([n for n in names if n not in (*OWN_TEXT, REFERENCE)], REFERENCE)
    for done, (what, prompt) in enumerate(found.items()):
        told("decoder", done, len(found))
        some = records.lacking("decoder", names, what)
        shift = done % max(len(some), 1)
        order = sorted(some[shift:] + some[:shift], key=lambda n: n in references)
        for name in order:
            time.sleep(REST)
            record = bench.run(name, prompt)
            try:
                ties = check(folder, name, what, record["texts"], bench.gap(prompt), references)
            except VerificationError as error:
                records.refuse("decoder", name, error)
                log(f"refused: {error}")
                continue
            records.put("decoder", name, what, record | dict(ties=ties))
            log(f"decoder {what:18} {name:18} {record['tokens'] / record['seconds']:6.1f}/s")
    told("decoder", len(found), len(found))


def why_not(args, kind):
    """By peer, why it is not run; the file of llama.cpp is made of the embedded decoder alone."""
    found = {name: status(peer, kind) for name, peer in PEERS.items()}
    if kind == "decoder" and args.decoder != DECODER:
        for name in (n for n in PEERS if n.startswith("llama.cpp")):
            found[name] = found[name] or "does not apply: only the embedded decoder is converted"
    return {n: why or ("" if n in args.peers else "not run") for n, why in found.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "out/model", help="converted encoder")
    parser.add_argument("--encoder", default=DEFAULT, help="that it was made of")
    parser.add_argument("--decoder", default=DECODER)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passages", type=int, default=320, help="for the encoder's quality")
    parser.add_argument("--seconds", type=float, default=8, help="about, per shape")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--windows", type=int, default=3, help="of 256 tokens, for perplexity")
    parser.add_argument("--tokens", type=int, default=40, help="new ones, at most")
    parser.add_argument("--only", choices=("encoder", "decoder"), help="one of the two parts")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), help="these and no others")
    parser.add_argument("--junit", type=Path, default=ROOT / "out/tests.xml", help="of `make test`")
    parser.add_argument("--tests", action="store_true", help="run those of the claims, minutes")
    parser.add_argument("--folder", type=Path, default=ROOT / "out/peers")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="one shape, two short texts, no page")
    parser.add_argument("--page", action="store_true", help="write the page from what is there")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.page:
        write_page(json.loads(args.out.read_text()), PAGE)
        return
    if args.quick:
        args.passages, args.tokens = 16, 6
        if args.folder == ROOT / "out/peers":
            args.folder = ROOT / "out/peers-quick"
        if args.out == RESULT:
            args.out = args.folder / "peers.json"
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    records = Records(args.folder)
    bars, told = progress()
    start = time.monotonic()

    def log(text):
        if not args.json:
            bars.console.print(text, highlight=False)

    missing = {kind: why_not(args, kind) for kind in ("encoder", "decoder")}
    with bars:
        for kind, run in (("encoder", run_encoder), ("decoder", run_decoder)):
            if args.only in (None, kind):
                run(args, records, [n for n, why in missing[kind].items() if not why], log, told)
    if args.tests:
        run_tests(args.junit)
    log(f"{(time.monotonic() - start) / 60:.1f} minutes")
    result = result_of(records, missing, read_tests(args.junit)) | dict(tests=when(args.junit))
    write_atomically(args.out, json.dumps(result, indent=1).encode())
    if args.out == RESULT:
        write_page(result, PAGE)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
