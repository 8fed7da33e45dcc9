"""``torch.compile(model, backend="skimp")``: fused kernels for blocks, Inductor for the rest."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule


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
    patches["post_grad_custom_post_pass"] = _lowering()
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled  # type: ignore[no-any-return]


def _lowering() -> Any:
    """The pass that swaps blocks and linear layers for kernels, in the form Inductor takes."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    from ..codegen.cpp import kernels, lower
    from ..ir.errors import CompileError

    class Lower(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            lower.lower(graph)

        def uuid(self) -> Any:
            files = sorted(Path(lower.__file__).parent.iterdir())
            return get_hash_for_files(tuple(str(f) for f in files if f.is_file()))

    try:
        kernels.ops()  # code from Inductor's cache calls them without the pass having run
    except CompileError:
        return None
    return Lower()
