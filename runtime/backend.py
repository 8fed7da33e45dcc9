"""``torch.compile(model, backend="skimp")``: fused kernels for blocks, Inductor for the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

LOWERING = "post_grad_custom_pre_pass"
"""Where in Inductor the op is lowered."""


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
    if any(isinstance(t, torch.Tensor) and t.device.type == "cuda" for t in example_inputs):
        patches[LOWERING] = with_lowering(patches.get(LOWERING))
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    return compiled  # type: ignore[no-any-return]


def with_lowering(passes: Any = None) -> tuple[Any, ...]:
    """Inductor's post-grad passes, with the one that shows it the kernels of blocks on CUDA.

    Args:
        passes: What else shall run there; by default what Inductor's configuration says.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import get_custom_graph_passes

    from ..codegen.triton.lower import Lowering

    given = getattr(config, LOWERING) if passes is None else passes
    return (*get_custom_graph_passes(given), Lowering())
