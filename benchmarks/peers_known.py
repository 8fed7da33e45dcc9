"""The peers of benchmarks/peers.py: who they are, what installs them, what does not apply."""

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Peer:
    """Something that runs the same model.

    Attributes:
        name: In tables.
        package: Of which version it is.
        module: What is imported.
        install: What a user without it types.
        precision: Of its weights and sums.
        tolerance: Largest relative error of its outputs; above, nothing of it is timed.
        note: How it was run.
        lacks: By kind of model, why it does not apply.
    """

    name: str
    package: str
    module: str
    install: str = "pip install 'skimp[peers]'"
    precision: str = "float32"
    tolerance: float = 1e-3
    note: str = ""
    lacks: tuple[tuple[str, str], ...] = ()

    @property
    def version(self):
        """As installed, or nothing."""
        try:
            return version(self.package) if importlib.util.find_spec(self.module) else ""
        except PackageNotFoundError:  # used from its folder
            return "?"


LLAMA = "pip install llama-cpp-python"
BUILT = "its defaults, on PyTorch's number of threads; keys and values of text are in float16"
PLAIN = "PyTorch's own exporter and ONNX Runtime's session; not onnxruntime-genai"
OV = "from the exported program, float32 and latency asked for"
TEXT = ("encoder", "it writes text, which an encoder does not")

PEERS = {
    p.name: p
    for p in (
        Peer("skimp", "skimp", "skimp", note="converted, `backend='skimp'`", lacks=(
            ("decoder", "listed as its two ways"),)),
        Peer("skimp, trees", "skimp", "skimp", note="`skimp.generate`: token trees of n-grams",
             lacks=(TEXT,)),
        Peer("skimp, one by one", "skimp", "skimp", note="the generated step, no drafts",
             lacks=(TEXT,)),
        Peer("HF generate", "transformers", "transformers", note="`model.generate`", lacks=(TEXT,)),
        Peer("eager", "torch", "torch", note="PyTorch as it is; a decoder in a bare greedy loop"),
        Peer("torch.compile", "torch", "torch",
             note="fixed shapes; a decoder's step with a static cache, its prompt in eager"),
        Peer("ONNX Runtime", "onnxruntime", "onnxruntime", note=PLAIN),
        Peer("OpenVINO", "openvino", "openvino", note=OV + "; a decoder with its cache inside"),
        Peer("llama.cpp", "llama-cpp-python", "llama_cpp", LLAMA, tolerance=2e-2, note=BUILT),
        Peer("llama.cpp Q8_0", "llama-cpp-python", "llama_cpp", LLAMA, "8-bit weights", 1e-1,
             BUILT),
        Peer("torchao", "torchao", "torchao", precision="8-bit weights", tolerance=1e-1,
             note="float32 is not what it is for, so its weights have 8 bits; with torch.compile"),
    )
}  # fmt: skip
"""By name, in the order of tables."""


def status(peer, kind):
    """Why a peer cannot be run on a kind of model; nothing if it can."""
    for lacking, why in peer.lacks:
        if lacking == kind:
            return f"does not apply: {why}"
    return "" if peer.version else f"not installed: {peer.install}"


def runnable(kind):
    """Names of those that can be run."""
    return [name for name, peer in PEERS.items() if not status(peer, kind)]
