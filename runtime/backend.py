"""``torch.compile(model, backend="skimp")``: fused kernels for blocks, Inductor for the rest."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule

LOWERING = "post_grad_custom_post_pass"
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
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(options["mode"]) if options.get("mode") else {}
    patches |= options.get("options") or {}
    cuda = any(isinstance(t, torch.Tensor) and t.device.type == "cuda" for t in example_inputs)
    patches[LOWERING] = with_lowering(patches.get(LOWERING), cuda=cuda)
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled  # type: ignore[no-any-return]


def with_lowering(passes: Any = None, *, cuda: bool) -> tuple[Any, ...]:
    """Inductor's passes, and one that swaps blocks and linear layers for kernels.

    Args:
        passes: What else shall run there; by default what Inductor's configuration says.
        cuda: The graph has tensors on CUDA, so that Triton, if it is installed, is asked too.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes

    from ..codegen.cpp import kernels
    from ..codegen.cpp.lower import Lowering as OnCpu
    from ..ir.errors import CompileError

    parts: list[CustomGraphPass] = []
    try:
        kernels.ops()  # code from Inductor's cache calls them without the pass having run
        parts.append(OnCpu())
    except CompileError:
        pass  # no compiler: the op stays, and says at run time why it runs its reference
    if cuda and importlib.util.find_spec("triton"):
        from ..codegen.triton.lower import Lowering as OnCuda

        parts.append(OnCuda())

    class Lower(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            for part in parts:
                part(graph)

        def uuid(self) -> Any:
            return tuple(part.uuid() for part in parts)

    given = getattr(config, LOWERING) if passes is None else passes
    return (*get_custom_graph_passes(given), Lower())
