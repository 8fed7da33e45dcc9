"""``torch.compile(model, backend="skimp")``: fused kernels for blocks, Inductor for the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule


def skimp(
    gm: GraphModule, example_inputs: Sequence[torch.Tensor], **options: Any
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured.

    Args:
        gm: The graph.
        example_inputs: Its inputs.
        options: Passed to Inductor as its configuration (``mode`` and ``options`` of
            :func:`torch.compile`).
    """
    from torch._inductor.compile_fx import compile_fx

    patches = dict(options.get("options") or {})
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    return compiled  # type: ignore[no-any-return]
