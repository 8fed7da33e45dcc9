"""The ways of decoding that benchmarks/decode.py times."""

import time

import torch
from llamacpp import LlamaCpp, gguf_file, installed
from skimp.ir.errors import SkimpError
from skimp.runtime.models import load_decoder
from skimp.runtime.tree.costs import Costs
from skimp.runtime.tree.drafting import Drafting
from skimp.runtime.tree.engine import Engine
from skimp.runtime.tree.fused import FusedTarget
from skimp.runtime.tree.policy import CostPolicy
from skimp.runtime.tree.published import CastPolicy, FixedPolicy

FIXED = ((3, 2), (5, 4), (9, 8), (17, 8))
"""Sizes and depths of fixed trees, of which the best is known in hindsight."""
FIXED_WAYS = {f"fixed {n} by {d}": (n, d) for n, d in FIXED}
HEADED = ("tree head", "EAGLE-2 head", *(f"{way} head" for way in FIXED_WAYS), "tree bfloat16 head")
"""With a trained head beside the n-grams."""
PEERS = ("llama.cpp F32", "llama.cpp BF16", "llama.cpp Q8_0")
WAYS = (
    "HF generate", "HF prompt lookup", "torch.compile", "plain", "tree", "EAGLE-2", "CAST",
    *FIXED_WAYS, "plain bfloat16", "tree bfloat16", *PEERS, *HEADED,
    "tree sparse", "tree n-gram+sparse",
)  # fmt: skip
BATCHED = ("HF generate", "plain", "tree", "EAGLE-2")
REFERENCES = dict.fromkeys(
    [w for w in WAYS if w not in ("HF generate", *PEERS) and "bfloat16" not in w], "HF generate"
) | dict.fromkeys(("tree bfloat16", "tree bfloat16 head"), "plain bfloat16")
"""Whose text each way must give; llama.cpp computes otherwise, and its text is its own."""
DRAFTS = {"tree sparse": "sparse", "tree n-gram+sparse": "ngram,sparse"}
CACHES = (512, 1280)
"""Positions of the static caches; one compilation each."""


class Clock:
    """A streamer that notes when the first new token came."""

    def __init__(self):
        self.start, self.first, self.calls = time.perf_counter(), None, 0

    def put(self, value):
        """Take tokens."""
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.first = time.perf_counter() - self.start

    def end(self):
        """Nothing to do."""


class Bench:
    """Runs ways; makes what they need at their first turn."""

    def __init__(self, loaded, tokens, *, sparse=None, head=None, log=print):
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.tokens, self.log = tokens, log
        self.sparse, self.head = sparse, head
        self.stop = frozenset([self.model.generation_config.eos_token_id])
        self.targets, self.engines, self.compiled, self.llamas = {}, {}, {}, {}

    def ways(self, names, wanted):
        """Those that can run here."""
        found = []
        for name in names:
            if wanted and name not in wanted and not name.startswith(_begins(wanted)):
                continue
            if (name in PEERS and not installed()) or (
                "sparse" in name and self.sparse is None
            ) or ("head" in name and self.head is None):  # fmt: skip
                continue
            found.append(name)
        return found

    def run(self, way, rows):
        """Decode; the first time, a short text goes before, so that nothing is built meanwhile."""
        call = self._call(way, rows)
        with torch.no_grad():
            return call()

    def _call(self, way, rows):
        if way in PEERS:
            return lambda: self._peer(way, rows[0])
        if way == "torch.compile":
            return lambda: self._compiled(rows[0])
        if way.startswith("HF"):
            return lambda: self._generate(way, rows)
        engine = self._engine(way, len(rows))
        return lambda: self._trees(engine, rows)

    def _generate(self, way, rows):
        """Transformers' own generation."""
        width = max(map(len, rows))
        pad = self.model.generation_config.pad_token_id
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        more = dict(prompt_lookup_num_tokens=10) if way == "HF prompt lookup" else {}
        clock = Clock()
        streamed = dict(streamer=clock) if len(rows) == 1 else {}
        start = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=self.tokens,
            do_sample=False,
            **streamed,
            **more,
        )
        taken = time.perf_counter() - start
        texts = [_cut(t[width:].tolist(), self.stop) for t in out]
        return _record(texts, taken, clock.first)

    def _trees(self, engine, rows):
        texts = engine.run(rows, limits=[self.tokens] * len(rows), stop=self.stop)
        report = engine.report
        return _record(texts, report.seconds, report.first) | dict(report=report.as_dict())

    def _engine(self, way, batch):
        key = way, batch
        if key in self.engines:
            return self.engines[key]
        dtype = torch.bfloat16 if "bfloat16" in way else torch.float32
        target, model, costs = self._target(dtype, "sparse" in way)
        rule = way.removesuffix(" head")
        draft = DRAFTS.get(way, "ngram" if rule == way else f"ngram,head:{self.head}")
        if way.startswith("plain"):
            draft = ""
        drafters = Drafting.parse(draft).make(target, costs, model, self.tokenizer)
        policy = CostPolicy(drafters, None)
        if rule == "EAGLE-2":
            policy = FixedPolicy(drafters, None)
        elif rule == "CAST":
            policy = CastPolicy(drafters, None)
        elif rule in FIXED_WAYS:
            size, depth = FIXED_WAYS[rule]
            policy = FixedPolicy(drafters, None, size=size, depth=depth)
        engine = self.engines[key] = Engine(target, drafters, policy, costs)
        warm = self.tokenizer("Once upon a time there was a king. The king was")["input_ids"]
        engine.run([warm] * batch, limits=[12] * batch)
        if engine.report.profiling:
            self.log(f"{way}: measured costs for {engine.report.profiling:.0f} s")
        return engine

    def _target(self, dtype, sparse):
        key = dtype, sparse
        if key not in self.targets:
            if sparse:
                converted = load_decoder(str(self.sparse)).model
                target, model = Drafting.parse("sparse").target(converted, dtype)
            else:
                target, model = FusedTarget(self.model, dtype=dtype), self.model
            self.targets[key] = target, model, Costs(target.name)
        return self.targets[key]

    def _compiled(self, prompt):
        """One token at a time by a compiled step with a static cache, as PyTorch does it best."""
        from transformers import StaticCache

        need = len(prompt) + self.tokens
        size = next((c for c in CACHES if c >= need), None)
        if size is None:
            raise SkimpError(f"{need} positions are more than any static cache here has")
        if size not in self.compiled:
            cache = StaticCache(config=self.model.config, max_cache_len=size)
            step = torch.compile(self.model, fullgraph=True, dynamic=False)
            self.compiled[size] = cache, step
            self._decode(cache, step, prompt[:8], 3)
        return self._decode(*self.compiled[size], prompt, self.tokens)

    def _decode(self, cache, step, prompt, count):
        cache.reset()

        def begin():
            ids = torch.tensor([prompt])
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())

        def go_on(token, done):
            last, at = torch.tensor([[token]]), torch.tensor([[len(prompt) + done - 1]])
            got = step(input_ids=last, position_ids=at, past_key_values=cache, use_cache=True)
            return int(got.logits[0, -1].argmax())

        return greedy(begin, go_on, count, self.stop)

    def _peer(self, way, prompt):
        """Plain greedy decoding of llama.cpp."""
        peer = self.llama(way)

        def begin():
            peer.prefill(prompt)
            return int(peer.last().argmax())

        def go_on(token, done):
            peer.decode([token], len(prompt) + done - 1, 1)
            return int(peer.last().argmax())

        return greedy(begin, go_on, self.tokens, self.stop)

    def llama(self, way):
        """llama.cpp, loaded."""
        if way not in self.llamas:
            self.llamas[way] = LlamaCpp(gguf_file(way.split()[-1]), 2048)
        return self.llamas[way]

    def gap(self, rows):
        """How far apart the likeliest two tokens are, relative, after so much of a row's text."""

        def near(row, text, at):
            ids = torch.tensor([rows[row] + text[:at]])
            with torch.no_grad():
                logits = self.model(ids, logits_to_keep=1).logits[0, -1]
            a, b = logits.topk(2).values.tolist()
            return (a - b) / max(abs(a), 1e-9)

        return near


def greedy(begin, go_on, count, stop):
    """Time a text of one token after the other.

    Args:
        begin: Runs the prompt, gives the first token.
        go_on: From the last token and how many there are to the next.
        count: Most tokens.
        stop: Tokens that end a text.
    """
    start = time.perf_counter()
    text = [begin()]
    first = time.perf_counter() - start
    while len(text) < count and text[-1] not in stop:
        text.append(go_on(text[-1], len(text)))
    return _record([text], time.perf_counter() - start, first)


def _begins(wanted):
    """Of names that end in a star, what is before it."""
    return tuple(w[:-1] for w in wanted if w.endswith("*"))


def _cut(text, stop):
    """Without the padding of a batch."""
    for i, token in enumerate(text):
        if token in stop:
            return text[: i + 1]
    return text


def _record(texts, seconds, first):
    return dict(texts=texts, tokens=sum(map(len, texts)), seconds=seconds, first=first)
