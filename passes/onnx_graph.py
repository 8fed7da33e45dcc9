"""An ONNX file as a graph of torch ops with the file's weights, for passes that look at graphs.

Shapes are those of the example: what a file computes of shapes alone is a constant in the graph.
It holds the ops of convolutional and attention networks; others are refused by name.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

from ..ir.errors import TraceError


def _conv(x: Tensor, w: Tensor, b: Tensor | None = None, **a: Any) -> Tensor:
    pads = a.get("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:]:
        x, pads = F.pad(x, (pads[1], pads[3], pads[0], pads[2])), [0, 0]
    return F.conv2d(
        x, w, b, a.get("strides", 1), pads[:2], a.get("dilations", 1), a.get("group", 1)
    )


def _gemm(x: Tensor, w: Tensor, b: Tensor | None = None, **a: Any) -> Tensor:
    x, w = x.T if a.get("transA") else x, w.T if a.get("transB") else w
    y = torch.mul(x @ w, a.get("alpha", 1.0))
    return y if b is None else torch.add(y, b, alpha=a.get("beta", 1.0))


def _instance_norm(x: Tensor, w: Tensor, b: Tensor, **a: Any) -> Tensor:
    return F.instance_norm(x, weight=w, bias=b, eps=a.get("epsilon", 1e-5))


def _reshape(x: Tensor, shape: list[int], **a: Any) -> Tensor:
    if not a.get("allowzero"):
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    return x.reshape(shape)


def _resize(x: Tensor, _: Any = None, scales: Any = None, sizes: Any = None, **a: Any) -> Tensor:
    kind = (a.get("mode"), a.get("coordinate_transformation_mode"))
    if kind != ("nearest", "asymmetric"):
        raise TraceError(f"Resize of kind {kind} is not among those that are read")
    factor = None if scales is None else list(scales)[2:]
    return F.interpolate(x, None if sizes is None else list(sizes)[2:], factor)


def _pool(x: Tensor, **a: Any) -> Tensor:
    return F.avg_pool2d(x, a["kernel_shape"], a["strides"], a.get("pads", [0, 0])[:2])


def _split(x: Tensor, sizes: Any = None, **a: Any) -> Any:
    dim = a.get("axis", 0)
    each = -(-x.shape[dim] // a["num_outputs"]) if sizes is None else list(sizes)
    return x.split(each, dim)


def _at(x: Any, axes: Any, insert: bool) -> Any:
    for axis in sorted(axes):
        x = x.unsqueeze(axis) if insert else x.squeeze(axis)
    return x


_OPS: dict[str, Callable[..., Any]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow,
    "Sqrt": torch.sqrt, "Log": torch.log, "Cos": torch.cos, "Sin": torch.sin,
    "Reciprocal": torch.reciprocal, "Sigmoid": torch.sigmoid, "MatMul": torch.matmul,
    "Conv": _conv, "Gemm": _gemm, "InstanceNormalization": _instance_norm, "Reshape": _reshape,
    "Resize": _resize, "AveragePool": _pool, "Split": _split,
    "Clip": lambda x, low=None, high=None: torch.clamp(x, low, high),
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "Einsum": lambda *xs, equation: torch.einsum(equation, *xs),
    "Concat": lambda *xs, axis: torch.cat(xs, axis),
    "Unsqueeze": lambda x, axes: _at(x, axes, True),
    "Squeeze": lambda x, axes=(0,): _at(x, axes, False),
}  # fmt: skip
_LISTS = {"Reshape": [1], "Resize": [2, 3], "Split": [1], "Unsqueeze": [1], "Squeeze": [1]}


def read_onnx(path: str | Path, example: Mapping[str, Tensor]) -> GraphModule:
    """Read a file.

    Args:
        path: Of one output.
        example: Inputs by name; the graph takes others of these shapes, in the file's order.

    Raises:
        TraceError: It holds an op that is not read, or is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.helper import get_attribute_value
    from onnx.numpy_helper import to_array

    try:
        proto = onnx.load(str(path)).graph
    except (OSError, DecodeError) as error:
        raise TraceError(f"{path} cannot be read as an ONNX file: {error}") from error
    if unknown := sorted({n.op_type for n in proto.node} - _OPS.keys() - {"Shape"}):
        raise TraceError(f"{path} holds ops that are not read: {', '.join(unknown)}")
    root, graph = nn.Module(), Graph()
    known = {i.name: torch.from_numpy(to_array(i).copy()) for i in proto.initializer}
    given: dict[str, Node] = {}
    values = dict(known)  # on the example

    def node_of(name: str) -> Node:
        if name not in given:
            _put(root, name, known[name])
            given[name] = graph.get_attr(_plain(name))
            given[name].meta["val"] = known[name].to("meta")
        return given[name]

    for i in proto.input:
        given[i.name] = graph.placeholder(i.name)
        given[i.name].meta["val"] = example[i.name].to("meta")
        values[i.name] = example[i.name]
    with torch.no_grad():
        for n in proto.node:
            attrs = {a.name: _decoded(get_attribute_value(a)) for a in n.attribute}
            if n.op_type == "Shape":
                size = torch.tensor(values[n.input[0]].shape)
                known[n.output[0]] = values[n.output[0]] = size[attrs["start"] : attrs.get("end")]
                continue
            lists = _LISTS.get(n.op_type, [])
            operands = [values[name] if name else None for name in n.input]
            operands = [
                x.tolist() if i in lists and x is not None else x for i, x in enumerate(operands)
            ]
            got = _OPS[n.op_type](*operands, **attrs)
            results = list(got) if isinstance(got, tuple) else [got]
            values.update(zip(n.output, results, strict=True))
            if all(name in known or not name for name in n.input):
                known.update(zip(n.output, results, strict=True))
                continue
            args = [
                x if i in lists or not name else node_of(name)
                for i, (name, x) in enumerate(zip(n.input, operands, strict=True))
            ]
            made = graph.call_function(_OPS[n.op_type], tuple(args), attrs)
            made.meta["val"] = got.to("meta") if isinstance(got, Tensor) else None
            for i, name in enumerate(n.output):
                given[name] = made
                if isinstance(got, tuple):
                    given[name] = graph.call_function(_item, (made, i))
                    given[name].meta["val"] = got[i].to("meta")
    graph.output(given[proto.output[0].name])
    gm = GraphModule(root, graph)
    gm.requires_grad_(False)
    return gm


def _item(parts: Any, i: int) -> Any:
    return parts[i]


def _decoded(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _plain(name: str) -> str:
    """A name that modules can bear."""
    return ".".join(p if p else "_" for p in name.replace("/", ".").split("."))


def _put(root: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = _plain(name).split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if value.is_floating_point() and math.prod(value.shape) > 1:
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)
