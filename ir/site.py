"""What discovery reports: feed-forward networks and attention projections, and near misses."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FFNSite:
    """One feed-forward network found in a graph.

    A plain site computes ``act(x @ w_in.T + b_in) @ w_out``; a gated one
    ``(act(x @ w_gate.T + b_gate) * (x @ w_in.T + b_in)) @ w_out``; both then add ``b_out``.

    Attributes:
        name: Longest common dotted prefix of the parameters' names.
        act: A key of :data:`skimp.ir.ACTIVATIONS`.
        d: Width of the input row.
        d_ff: Number of hidden neurons.
        d_out: Width of the output row.
        w_in, b_in, w_gate, b_gate, w_out, b_out: Names of the parameters; ``None`` where absent.
        transposed: The weights are stored ``[in, out]`` (Conv1D) rather than ``[out, in]``.
        fused: ``w_in`` and ``w_gate`` are halves of one parameter; ``"gate_up"`` when the gate
            rows come first, ``"up_gate"`` when they come last, ``None`` when they are apart.
        input_node, output_node: Names of the graph nodes that feed and end the site.
    """

    name: str
    act: str
    d: int
    d_ff: int
    d_out: int
    w_in: str
    b_in: str | None
    w_gate: str | None
    b_gate: str | None
    w_out: str
    b_out: str | None
    input_node: str
    output_node: str
    transposed: bool = False
    fused: str | None = None

    @property
    def gated(self) -> bool:
        """Whether a second projection gates the hidden neurons."""
        return self.w_gate is not None


@dataclass(frozen=True, slots=True)
class ProjectionSite:
    """One projection of an attention: a linear layer, or the part of a fused one with one role.

    Attributes:
        name: The weight's dotted name without ``weight``; of a part of a fused one, with its role.
        role: ``query``, ``key``, ``value`` or ``output``.
        d: Width of the input row.
        d_out: Width of the output row; narrower for grouped keys and values.
        weight, bias: Names of the parameters; ``bias`` is ``None`` where absent.
        columns: Runs ``(start, stop)`` of the fused output that are this projection's, in order;
            ``None`` for a whole linear layer.
        transposed: The weight is stored ``[in, out]`` (Conv1D) rather than ``[out, in]``.
        input_node, output_node: Names of the graph nodes that feed and compute the linear layer.
    """

    name: str
    role: str
    d: int
    d_out: int
    weight: str
    bias: str | None
    columns: tuple[tuple[int, int], ...] | None
    transposed: bool
    input_node: str
    output_node: str


@dataclass(frozen=True, slots=True)
class Miss:
    """A place that nearly matched: why it did not, and the nodes concerned."""

    reason: str
    nodes: tuple[str, ...] = ()
