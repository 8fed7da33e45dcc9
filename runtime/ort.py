"""The dense model in ONNX Runtime: the rival that is not PyTorch."""

import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NEEDS = ("onnxruntime", "onnx", "onnxscript")
FUSED_ATTENTION = 23
"""The first opset with one operator for attention, the fastest there is in ONNX Runtime."""


def missing() -> list[str]:
    """Packages of :data:`NEEDS` that are not installed."""
    return [name for name in NEEDS if find_spec(name) is None]


def onnx_session(
    model: nn.Module, example: Mapping[str, Tensor]
) -> Callable[[Mapping[str, Tensor]], list[Any]]:
    """A model in ONNX Runtime on CPU, with all graph optimisations and torch's threads.

    Args:
        model: In evaluation mode.
        example: Keyword arguments of one call, ``[batch, length]`` each, both at least 2.

    Returns:
        From keyword arguments, of any batch and length, to the outputs as arrays.
    """
    import onnxruntime

    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        torch.onnx.export(
            model,
            (),
            path,
            kwargs=dict(example),
            dynamic_shapes=dict.fromkeys(example, dynamic),
            opset_version=FUSED_ATTENTION,
            dynamo=True,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    kept = {i.name for i in session.get_inputs()}

    def run(batch: Mapping[str, Tensor]) -> list[Any]:
        return list(session.run(None, {n: v.numpy() for n, v in batch.items() if n in kept}))

    return run
