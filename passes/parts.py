"""Run a graph in parts: what is inside one is computed again for the backward pass.

Only what goes from one part to the next is kept meanwhile (gradient checkpointing), and, sharded,
the weights of one part are whole at a time.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils.checkpoint import checkpoint

from .data import Batch


class Part(nn.Module):
    """Some nodes of a graph, in order, and those that read the weights for them."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        super().__init__()
        held = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a.op == "get_attr")
        self.nodes = [*held, *nodes]  # a weight is not handed on: it is whole in its part alone
        inside = set(self.nodes)
        self.reads = list(
            dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside)
        )
        self.gives = [n for n in nodes if any(u not in inside for u in n.users)]

    def forward(self, interpreter: Interpreter, *known: Any) -> list[Any]:
        """What later parts read, from the values that this one reads."""

        def run(*known: Any) -> list[Any]:
            interpreter.env = dict(zip(self.reads, known, strict=True))
            for n in self.nodes:
                interpreter.env[n] = interpreter.run_node(n)
            return [interpreter.env[n] for n in self.gives]

        return checkpoint(run, *known, use_reentrant=False)  # type: ignore[no-any-return]


class Parts(nn.Module):
    """A whole graph.

    Args:
        gm: The graph, whose modules may be replaced as long as calls of them stay.
        cuts: Into how many parts of like length, or after which modules one ends.
    """

    def __init__(self, gm: GraphModule, cuts: int | Collection[str]) -> None:
        super().__init__()
        self.graph_nodes = list(gm.graph.nodes)
        body = [n for n in self.graph_nodes if n.op not in ("placeholder", "get_attr", "output")]
        if isinstance(cuts, int):
            size = -(-len(body) // cuts)
            groups = [body[at : at + size] for at in range(0, len(body), size)]
        else:
            groups = [[]]
            for n in body:
                groups[-1].append(n)
                if n.op == "call_module" and n.target in cuts:
                    groups.append([])
        self.list = nn.ModuleList(Part(group) for group in groups if group)

    @property
    def parts(self) -> list[Part]:
        """In order."""
        return [p for p in self.list if isinstance(p, Part)]

    def forward(self, interpreter: Interpreter, *inputs: Any) -> Any:
        """Run all parts, each node as the interpreter does it."""
        placeholders = (n for n in self.graph_nodes if n.op == "placeholder")
        values = dict(zip(placeholders, inputs, strict=True))
        for part in self.parts:
            found = part(interpreter, *(values[n] for n in part.reads))
            values |= dict(zip(part.gives, found, strict=True))
        interpreter.env = values
        return interpreter.run_node(self.graph_nodes[-1])


def run(interpreter: Interpreter, batch: Batch, parts: Parts | None = None) -> Any:
    """A model's output for a batch, at once or part by part."""
    inputs = [batch[str(n.target)] for n in interpreter.graph.nodes if n.op == "placeholder"]
    if parts is None:
        outputs = interpreter.run(*inputs, enable_io_processing=False)
    else:
        outputs = parts(interpreter, *inputs)
    return interpreter.graph.process_outputs(outputs)
