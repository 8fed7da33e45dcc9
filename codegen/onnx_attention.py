"""Attention in standard operators of ONNX, as torch computes it.

softmax(q @ k^T * scale + mask) @ v  -->  MatMul(q * scale, Transpose(k)) + limit, Softmax, MatMul

The exporter's own translation spends nine nodes on the transposition, looks for NaN among all
weights, and gives rows that see no key the mean of all values. Here such rows are zeros, as in
eager mode, and the lone Transpose is what runtimes merge into the product.
"""

from typing import Any

import torch
from onnxscript import opset18 as op
from onnxscript.ir import DataType

SDPA = torch.ops.aten.scaled_dot_product_attention.default


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """What the exporter calls for :data:`SDPA`.

    Args:
        query: ``[batch, heads, length, size]``; the size is fixed.
        key: ``[batch, heads, keys, size]``, or fewer heads that are shared.
        value: Like the keys.
        attn_mask: Of Booleans, true where a key is seen, or of summands.
        dropout_p: Without effect: an exported model does not learn.
        is_causal: A row sees no later key.
        scale: Of the products, by default the size to the power of -1/2.
        enable_gqa: Heads of keys and values are shared.
    """
    size = int(query.shape[-1])
    if enable_gqa:
        key, value = (_shared(t, int(query.shape[1])) for t in (key, value))
    scaled = op.Mul(query, _like(size**-0.5 if scale is None else scale, query))
    weights = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    mask = _causal(query, key) if is_causal else attn_mask
    if mask is None:
        return op.MatMul(op.Softmax(weights, axis=-1), value)
    if is_causal or mask.dtype == DataType.BOOL:
        mask = op.Where(mask, _like(0.0, query), _like(float("-inf"), query))
    # alike in every layer, so runtimes compute it once
    zero, axis = _like(0.0, query), op.Constant(value_ints=[-1])
    blind = op.IsInf(op.ReduceMax(mask, axis, keepdims=1), detect_positive=0)
    limit = op.Where(blind, zero, mask)
    seen = op.MatMul(op.Softmax(op.Add(weights, limit), axis=-1), value)
    return op.Where(blind, zero, seen)


def _like(number: float, tensor: Any) -> Any:
    return op.CastLike(op.Constant(value_float=number), tensor)


def _causal(query: Any, key: Any) -> Any:
    shape = op.Concat(op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3), axis=0)
    return op.Cast(op.Trilu(op.Expand(op.Constant(value_float=1.0), shape), upper=0), to=9)


def _shared(tensor: Any, heads: int) -> Any:
    """``[batch, shared, keys, size]`` --> ``[batch, heads, keys, size]``."""
    times, size = heads // int(tensor.shape[1]), int(tensor.shape[3])
    apart = op.Unsqueeze(tensor, op.Constant(value_ints=[2]))
    several = op.Expand(apart, op.Constant(value_ints=[1, 1, times, 1, 1]))
    return op.Reshape(several, op.Constant(value_ints=[0, heads, -1, size]))
