"""The decoder by every peer: greedy text, timed, and perplexity where a peer gives logits."""

import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from decode_ways import Bench, greedy
from peers_encoder import compile_openvino, quantised
from skimp.runtime.language import perplexity
from torch import nn

BENCH = {
    "skimp, trees": "tree", "skimp, one by one": "plain", "HF generate": "HF generate",
    "torch.compile": "torch.compile", "llama.cpp": "llama.cpp F32",
    "llama.cpp Q8_0": "llama.cpp Q8_0",
}  # fmt: skip
"""Peers that benchmarks/decode_ways.py runs, by its names."""
REFERENCE = "HF generate"
OWN_TEXT = ("llama.cpp", "llama.cpp Q8_0", "torchao")
"""Those that compute otherwise; their texts are their own, and their perplexity is held."""


class Step(nn.Module):
    """A causal model with its cache as tensors, and logits of the rows that are asked for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, keep, past):
        """Run tokens ``[1, n]`` after ``past``; logits are of rows ``keep``."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in zip(cache.layers, past, strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        out = self.model(
            input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=keep
        )
        return out.logits, [[layer.keys, layer.values] for layer in cache.layers]


def cache_shape(model):
    """Of one text's keys: heads, tokens (any number), width."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, -1, width


def program(model):
    """A step as an exported program of any number of tokens, at least none before them."""
    heads, _, width = cache_shape(model)
    shape = 1, heads, 5, width
    layers = range(model.config.num_hidden_layers)
    past = [[torch.randn(shape), torch.randn(shape)] for _ in layers]
    free = torch.export.Dim.AUTO
    return torch.export.export(
        Step(model),
        (torch.arange(3)[None] + 1, torch.tensor([1, 2]), past),
        dynamic_shapes=({1: free}, {0: free}, [[{2: free}, {2: free}] for _ in past]),
    )


class Onnx:
    """ONNX Runtime; keys and values stay where they are from call to call."""

    def __init__(self, path):
        import onnxruntime

        self.runtime = onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.shape = self.session.get_inputs()[-1].shape

    @staticmethod
    def write(exported, shape, path):
        """Once."""
        torch.onnx.export(exported, dynamo=True, verbose=False).save(path, external_data=True)

    def clear(self):
        """Forget the text."""
        none = torch.zeros(1, self.shape[1], 0, self.shape[3]).numpy()
        self.past = [self.runtime.OrtValue.ortvalue_from_numpy(none)] * (len(self.inputs) - 2)

    def run(self, tokens, rows):
        """Logits ``[rows, words]`` of the last so many."""
        keep = torch.arange(len(tokens) - rows, len(tokens))
        made = [self.runtime.OrtValue.ortvalue_from_numpy(t.numpy()) for t in (
            torch.tensor([tokens]), keep)]  # fmt: skip
        feed = dict(zip(self.inputs, [*made, *self.past], strict=True))
        logits, *self.past = self.session.run_with_ort_values(self.outputs, feed)
        return torch.from_numpy(logits.numpy())[0]


class OpenVino:
    """OpenVINO; keys and values are its state."""

    def __init__(self, path):
        self.request = compile_openvino(path).create_infer_request()

    @staticmethod
    def write(exported, shape, path):
        """Once, with the cache moved inside."""
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation

        made = openvino.convert_model(exported)
        empty = dict.fromkeys(made.inputs[2:], openvino.PartialShape([1, *shape]))
        made.reshape(empty)  # else nothing says what a state is at first
        names = [f"past.{i}" for i in range(len(made.inputs) - 2)]
        pairs = {}
        for name, given, kept in zip(names, made.inputs[2:], made.outputs[1:], strict=True):
            given.get_tensor().set_names({name})
            kept.get_tensor().set_names({f"{name}.next"})
            pairs[name] = f"{name}.next"
        apply_make_stateful_transformation(made, pairs)
        openvino.save_model(made, path, compress_to_fp16=False)

    def clear(self):
        """Forget the text."""
        self.request.reset_state()

    def run(self, tokens, rows):
        """Logits ``[rows, words]`` of the last so many."""
        keep = torch.arange(len(tokens) - rows, len(tokens))
        found = self.request.infer([torch.tensor([tokens]).numpy(), keep.numpy()])
        return torch.from_numpy(found[0])[0]


class Eager:
    """PyTorch without ``generate``."""

    def __init__(self, model):
        self.model = model

    def clear(self):
        """Forget the text."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)

    def run(self, tokens, rows):
        """Logits ``[rows, words]`` of the last so many."""
        ids = torch.tensor([tokens])
        return self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=rows
        ).logits[0]


class Decoder:
    """Peers, made when they are asked for.

    Args:
        loaded: The model and its tokenizer.
        tokens: New ones, at most.
        folder: For what is written once.
    """

    def __init__(self, loaded, tokens, folder, log):
        self.loaded, self.tokens, self.folder = loaded, tokens, folder
        self.bench = Bench(loaded, tokens, log=log)
        self.made = {}

    def run(self, name, prompt):
        """A record of ``decode_ways``; builds nothing, if the peer ran before."""
        if name == "torchao" or name in BENCH:
            bench = self._quantised if name == "torchao" else self.bench
            bench.tokens = self.tokens
            return bench.run(BENCH.get(name, "torch.compile"), [prompt])
        runner = self._runner(name)

        def begin():
            runner.clear()
            return int(runner.run(prompt, 1)[-1].argmax())

        def go_on(token, _):
            return int(runner.run([token], 1)[-1].argmax())

        return greedy(begin, go_on, self.tokens, self.bench.stop)

    def warm(self, name):
        """Build what a peer needs, and run a few tokens."""
        wanted, self.tokens = self.tokens, 4
        try:
            self.run(name, list(range(1, 9)))
        finally:
            self.tokens = wanted

    def gap(self, prompt):
        """How near a tie a text is; see ``Bench.gap``."""
        return self.bench.gap([prompt])

    def perplexity(self, name, data):
        """Of windows of one text each, all logits by the peer itself."""
        if name == "torch.compile":
            return None  # its program is of one token
        return perplexity(
            lambda input_ids, **_: self._logits(name, input_ids[0].tolist())[None], data
        )

    def _logits(self, name, ids):
        if name.startswith("skimp"):
            target, _, _ = self.bench._target(torch.float32, False)
            first, _ = target.prefill([ids[:1]])
            chain = torch.tensor(ids[1:]), torch.arange(-1, len(ids) - 2)
            return torch.cat([first, target.verify([chain[0]], [chain[1]])[0]])
        if name.startswith("llama.cpp"):
            peer = self.bench.llama(BENCH[name])
            peer.prefill(ids[:1])
            first = peer.last().clone()
            return torch.cat([first[None], peer.step(ids[1:])])
        runner = self._runner(name)
        runner.clear()
        return runner.run(ids, len(ids))

    @cached_property
    def _program(self):
        return program(self.loaded.model)

    @cached_property
    def _quantised(self):
        model = quantised(self.loaded.model)
        return Bench(replace(self.loaded, model=model), self.tokens)

    def _runner(self, name):
        if name in ("eager", "HF generate"):
            return Eager(self.loaded.model)
        if name == "torchao":
            return Eager(self._quantised.model)
        if name not in self.made:
            kind, file = {"ONNX Runtime": (Onnx, "m.onnx"), "OpenVINO": (OpenVino, "m.xml")}[name]
            folder = self.folder / "programs" / name
            if not folder.exists():
                with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                    whole = Path(scratch) / "whole"
                    whole.mkdir()
                    model = self.loaded.model
                    kind.write(self._program, cache_shape(model), whole / file)
                    folder.parent.mkdir(exist_ok=True)
                    whole.rename(folder)
            self.made[name] = kind(folder / file)
        return self.made[name]
