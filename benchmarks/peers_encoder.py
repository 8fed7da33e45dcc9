"""The encoder by every peer: one call from a batch to states ``[batch, length, d]``."""

from copy import deepcopy
from functools import cache, cached_property, partial
from types import FunctionType

import torch
from llamacpp import LlamaCpp, encoder_file
from skimp.passes.base import first_tensor, pooled
from skimp.passes.quality import neighbour_overlap
from skimp.runtime.demo import exactly
from skimp.runtime.ort import onnx_session
from torch.nn import functional as F

QUALITY_SHAPE = (8, 64)
"""Quality is of the very programs that are timed at this shape."""
CALL = 512
"""Most tokens of one call of llama.cpp: its default, and it attends within a call to all."""


class Encoder:
    """Peers, made when they are asked for.

    Args:
        loaded: The dense model and its tokenizer.
        converted: The same, converted.
        text: Passages that neither was trained on.
        folder: For what is written once.
    """

    def __init__(self, loaded, converted, text, folder):
        self.dense, self.tokenizer = loaded.model, loaded.tokenizer
        self.converted, self.text, self.folder = converted, text, folder

    def ways(self, names):
        """Calls by name, new programs where a program is of one shape."""
        torch.compiler.reset()
        return {name: MAKERS[name](self) for name in names}

    def inputs(self, batch, length):
        """Real text of exactly this shape."""
        return exactly(self.tokenizer, self.text, batch, length)

    def wanted(self, name, inputs):
        """What a call has to give: its own model's states, computed plainly."""
        model = self.converted if name == "skimp" else self.dense
        return first_tensor(model(**inputs))

    def quality(self, ways, shape):
        """By name: cosine to the dense embedding, and overlap of the ten nearest neighbours."""
        batch, length = shape
        found = {name: [] for name in ("dense", *ways)}
        for i in range(0, len(self.text) // batch * batch, batch):
            encoded = self.tokenizer(
                list(self.text[i : i + batch]), padding="max_length", truncation=True,
                max_length=length, return_tensors="pt",
            )  # fmt: skip
            inputs = {name: encoded[name] for name in self.inputs(1, 2)}
            found["dense"].append(pooled(self.dense(**inputs), inputs))
            for name, way in ways.items():
                found[name].append(pooled(way(inputs), inputs).clone())
        rows = {name: torch.cat(parts) for name, parts in found.items()}
        want = rows.pop("dense")
        return {
            name: dict(
                cosine=float(F.cosine_similarity(got, want, dim=-1).mean()),
                overlap=neighbour_overlap(got, want),
                passages=len(want),
            )
            for name, got in rows.items()
        }

    # -- how each is made -------------------------------------------------------------------------

    def _eager(self):
        return lambda inputs: first_tensor(self.dense(**inputs))

    def _compiled(self, model=None, backend="inductor"):
        # a frozen model need not look at its weights in each call, neither ours nor theirs
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        fast = torch.compile(model or self.dense, backend=backend, dynamic=False, options=options)
        return lambda inputs: first_tensor(fast(**inputs))

    def _skimp(self):
        return self._compiled(self.converted, "skimp")

    def _onnx(self):
        return lambda inputs: torch.from_numpy(self._session(inputs)[0])

    def _openvino(self):
        run = self._openvino_model
        names = {i.any_name for i in run.inputs}

        def call(inputs):
            feed = {n: v.numpy() for n, v in inputs.items() if n in names}
            return torch.from_numpy(run(feed, share_outputs=True)[0])

        return call

    def _llama(self, kind="F32"):
        return partial(self._llama_call, self._llama_model(kind))

    def _llama_q8(self):
        return self._llama("Q8_0")

    def _torchao(self):
        def run(**inputs):
            return model(**inputs)

        # programs are kept by their code, and no guard tells one model from another of its class
        model, code = self._quantised, run.__code__.replace()
        return self._compiled(FunctionType(code, run.__globals__, closure=run.__closure__))

    @cached_property
    def _session(self):
        return onnx_session(self.dense, self.inputs(2, 16))

    @cached_property
    def _openvino_model(self):
        import openvino

        example = self.inputs(2, 16)
        free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        shapes = dict.fromkeys(example, free)
        program = torch.export.export(self.dense, (), example, dynamic_shapes=shapes)
        return compile_openvino(openvino.convert_model(program))

    @cached_property
    def _quantised(self):
        return quantised(self.dense)

    @cache  # noqa: B019 - one encoder lives as long as the process
    def _llama_model(self, kind):
        path = self.folder / f"encoder-{kind}.gguf"
        if not path.exists():
            encoder_file(self.dense, path, kind)
        return LlamaCpp(path, 4 * CALL, sequences=64)

    def _llama_call(self, model, inputs):
        """It knows no padding: real tokens go in, and states of padding are left 0."""
        kept = inputs["attention_mask"].bool()
        rows = [ids[m].tolist() for ids, m in zip(inputs["input_ids"], kept, strict=True)]
        at = max(1, min(64, CALL // kept.shape[1]))
        found = torch.cat([model.encode(rows[i : i + at]) for i in range(0, len(rows), at)])
        states = torch.zeros(*kept.shape, found.shape[1])
        states[kept] = found
        return states


def compile_openvino(model):
    """A model or its file ready to run, in float32 and on PyTorch's number of threads."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # beside other programs it took 2.5 times as long with it
    }
    return openvino.Core().compile_model(model, "CPU", settings)


def quantised(model):
    """A copy whose linear layers keep weights of 8 bits by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    copy = deepcopy(model)
    quantize_(copy, Int8WeightOnlyConfig())
    return copy


MAKERS = {
    "skimp": Encoder._skimp, "eager": Encoder._eager, "torch.compile": Encoder._compiled,
    "ONNX Runtime": Encoder._onnx, "OpenVINO": Encoder._openvino, "llama.cpp": Encoder._llama,
    "llama.cpp Q8_0": Encoder._llama_q8, "torchao": Encoder._torchao,
}  # fmt: skip
