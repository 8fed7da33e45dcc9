"""Capture a model as one graph, in the form that every pass works on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule

from ..ir.errors import TraceError, out_of_memory


def trace(model: nn.Module, example: Mapping[str, Any]) -> GraphModule:
    """Export a model to a graph of aten ops that computes the same, for any batch and length.

    The result takes the same keyword arguments, returns the same type, and owns parameters under
    the same names. Its first two dimensions are free wherever the model allows it. A decoder is
    captured without its key-value cache (``config.use_cache``), unless the example asks for one.

    Args:
        model: Any module, in evaluation mode.
        example: Keyword arguments of one call. Tensors should have first dimensions of at
            least 2, or they are taken for constants.

    Raises:
        TraceError: The model cannot be exported as one graph.
    """
    free = {name: free_dimensions(value) for name, value in example.items()}
    try:
        with torch.no_grad(), _without_cache(model):
            program = torch.export.export(model, (), dict(example), dynamic_shapes=free)
    except Exception as error:
        if out_of_memory(error):
            raise  # no fault of the model
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise TraceError(
            f"{type(model).__name__} cannot be captured as one graph: {first_line}\n"
            "Check that it runs with these inputs in evaluation mode, and that control flow does "
            "not depend on values; torch.export.draft_export(model, (), example) lists every cause."
        ) from error
    # Guards would refuse the lengths that the example did not have.
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    return module


def free_dimensions(value: Any) -> Any:
    """Which dimensions of an argument are free: batch and, of token ids and masks, length."""
    if isinstance(value, Mapping):
        return {name: free_dimensions(inner) for name, inner in value.items()}
    if not isinstance(value, torch.Tensor) or not value.dim():
        return None
    return dict.fromkeys(range(1 if value.is_floating_point() else min(value.dim(), 2)), Dim.AUTO)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    # encoders and decoders may have configurations of their own
    found = [getattr(m, "config", None) for m in model.modules()]
    cached = [c for c in {id(c): c for c in found}.values() if getattr(c, "use_cache", False)]
    for config in cached:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True  # type: ignore[union-attr]
