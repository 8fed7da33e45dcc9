"""Linear layers of a graph, however they are spelled.

linear(x, w, b)        aten.linear
addmm(b, x, w)         the Conv1D of GPT-2, stored [in, out]
x @ w^T, x @ w [+ b]   products with a parameter, and a sum with another
"""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_PRODUCTS = {aten.matmul.default, aten.mm.default}
_TURNS = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a graph, however it is spelled.

    Attributes:
        node: What computes it.
        product: Where ``node`` only adds the bias, what it adds it to.
    """

    node: Node
    x: Node
    weight: str
    bias: str | None
    transposed: bool
    d_in: int
    d_out: int
    product: Node | None = None


def as_linear(gm: GraphModule, node: Node) -> Linear | None:
    """The linear layer that a node computes, or ``None``."""
    if node.op != "call_function":
        return None
    x: Any
    weight: Any
    bias: Any = None
    args: Any = node.args
    if node.target is aten.linear.default:
        x, weight, *rest = args
        bias, transposed = (rest[0] if rest else node.kwargs.get("bias")), False
    elif node.target is aten.addmm.default and not node.kwargs:
        (bias, x, weight), transposed = args, True
    elif node.target is aten.add.Tensor and not node.kwargs:
        return _with_bias(gm, node)
    elif node.target in _PRODUCTS:
        x, (weight, transposed) = args[0], _turned(args[1])
        if not isinstance(_parameter(gm, weight), torch.nn.Parameter):
            return None
    else:
        return None
    w = _parameter(gm, weight)
    if w is None or w.dim() != 2 or (bias is not None and _parameter(gm, bias) is None):
        return None
    assert isinstance(x, Node)
    d_in, d_out = w.shape if transposed else reversed(w.shape)
    return Linear(node, x, weight.target, bias and bias.target, transposed, d_in, d_out)


def _turned(weight: Any) -> tuple[Any, bool]:
    """The second factor of a product, and whether it is stored as it is multiplied."""
    if isinstance(weight, Node) and weight.target in _TURNS:
        return weight.args[0], False
    return weight, True


def _with_bias(gm: GraphModule, node: Node) -> Linear | None:
    """A product and a sum, where nothing else reads the product."""
    product, bias = node.args[:2]
    if not isinstance(product, Node) or product.target not in _PRODUCTS:
        product, bias = bias, product
    if not isinstance(product, Node) or product.target not in _PRODUCTS or len(product.users) > 1:
        return None
    linear, b = as_linear(gm, product), _parameter(gm, bias)
    if linear is None or b is None or tuple(b.shape) != (linear.d_out,):
        return None
    assert isinstance(bias, Node)
    return replace(linear, node=node, bias=str(bias.target), product=product)


def _parameter(gm: GraphModule, node: Any) -> Tensor | None:
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(gm)
    return value if isinstance(value, Tensor) else None
