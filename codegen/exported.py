"""What every door shares: a program from tensors to tensors, and a report of what came out."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from ..ir.block import DynkFFN
from ..ir.cost import dense_flops
from ..ir.errors import ExportError, first_line
from ..passes.base import looking
from ..passes.lift import blocks, lifted_layers
from ..passes.trace import free_dimensions


@dataclass(frozen=True, slots=True)
class Program:
    """A model ready for any door.

    Attributes:
        program: Takes the input tensors in order, returns a tuple of tensors.
        inputs, outputs: Their names, in order.
        example: The tensors it was captured with.
        expected: What the model made of them, in order.
        taus: The name in ``program`` of each block's threshold, by block.
        gates: The blocks whose gate is their router.
        free: Which dimensions of each input are.
        coverage: Share of the dense model's FLOPs (of linear layers) in converted blocks.
        tied: Blocks in which a score of the example ties with its limit.
    """

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]
    taus: dict[str, str]
    gates: tuple[str, ...]
    free: dict[str, list[int]]
    coverage: float
    tied: tuple[str, ...]

    def index(self) -> dict[str, Any]:
        """What an artefact has to say of itself to be called by name."""
        return {
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "taus": self.taus,
            "gates": list(self.gates),
            "free": self.free,
        }

    def compare(
        self, run: Callable[[Mapping[str, Tensor]], list[Tensor]], tolerance: float
    ) -> dict[str, dict[str, float]]:
        """The errors of an artefact on the example; see :attr:`Report.errors`.

        Raises:
            ExportError: One is above the tolerance.
        """
        got = run(dict(zip(self.inputs, self.example, strict=True)))
        errors = differences(self.outputs, self.expected, got)
        check_errors(errors, tolerance, self.tied)
        return errors


@dataclass(frozen=True, slots=True)
class Report:
    """What an export gave.

    Attributes:
        door: ``pt2``, ``onnx``, ``mlir``, ``iree`` or ``safetensors``.
        file: Where it is.
        bytes: Its size, with all files that belong to it.
        runtime: What is needed to run it.
        coverage: See :class:`Program`.
        blocks: Number of converted blocks.
        errors: By output, ``max`` and ``mean`` absolute difference to the model, and ``relative``:
            the norm of the difference over that of the output.
        free: Free dimensions by input.
        metric: Of the task, of the model and of the artefact, where one was given.
        notes: What a user should know.
    """

    door: str
    file: str
    bytes: int
    runtime: str
    coverage: float
    blocks: int
    errors: dict[str, dict[str, float]]
    free: dict[str, list[int]]
    metric: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Plain(nn.Module):
    """A model whose inputs are tensors in a row, and whose outputs are a tuple of tensors.

    No type of the library that the model comes from is left at its border, so that a process
    without that library can call it.
    """

    def __init__(self, model: nn.Module, example: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        paths, self._spec = tree_flatten_with_path(dict(example))
        self._leaves = [value for _, value in paths]
        self._at = [i for i, value in enumerate(self._leaves) if isinstance(value, Tensor)]
        self.names = _names([paths[i][0] for i in self._at])
        self.example = tuple(self._leaves[i].contiguous() for i in self._at)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors of the keyword arguments, in order."""
        leaves = [None if isinstance(v, Tensor) else v for v in self._leaves]
        for i, tensor in zip(self._at, tensors, strict=True):
            leaves[i] = tensor
        return _tensors(self.model(**tree_unflatten(leaves, self._spec)))[1]


def _names(paths: Sequence[Any], empty: str = "input") -> tuple[str, ...]:
    names = [re.sub(r"\W+", "_", keystr(path)).strip("_") or empty for path in paths]
    return tuple(n if not n[0].isdigit() else f"{empty}_{n}" for n in names)


def capture(
    model: nn.Module,
    example: Mapping[str, Any],
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
    floor: float = 0.0,
) -> Program:
    """Capture a converted model.

    Args:
        model: With blocks, in evaluation mode: a graph of :func:`skimp.convert`, or a module tree.
        example: Keyword arguments of one call; nested lists of tensors are taken apart. Free
            dimensions should be at least 2 in it.
        dynamic_shapes: Free dimensions by input name, as :func:`torch.export.export` takes them;
            by default the first of every tensor, and the second of integers, where the model
            allows it.
        floor: Least share of FLOPs in converted blocks.

    Raises:
        ExportError: There is no block, too few of them, or the model cannot be captured.
    """
    if not blocks(model):
        raise ExportError(
            f"{type(model).__name__} holds no converted block, so there is nothing of skimp to "
            "export; convert it first, or use torch.export and torch.onnx.export themselves"
        )
    share = coverage(model)
    check_floor(share, floor)
    plain = Plain(model, example).eval()
    with watch_ties(model) as seen:
        named, expected = run_model(model, example)
    tied = tuple(dict.fromkeys(name for name, rows in seen if bool(rows.any())))
    outputs = tuple(f"{n}_out" if n in plain.names else n for n in named)
    if dynamic_shapes is None:
        given: dict[str, Any] = {
            n: free_dimensions(t) for n, t in zip(plain.names, plain.example, strict=True)
        }
    else:
        given = {n: dict(dynamic_shapes.get(n) or {}) for n in plain.names}
    shapes = (tuple(given[n] for n in plain.names),)
    try:
        with torch.no_grad():
            program = torch.export.export(plain, plain.example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be exported: {first_line(error)}\nCheck that it runs "
            "with this example, and that free dimensions are not fixed in it; "
            "torch.export.draft_export lists every cause."
        ) from error
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    values = values[len(values) - len(plain.names) :]
    free = {
        name: [i for i, n in enumerate(v.shape) if isinstance(n, torch.SymInt)]
        for name, v in zip(plain.names, values, strict=True)
    }
    taus = {name: f"model.{name}.tau" for name in blocks(model)}
    gates = tuple(name for name, block in blocks(model).items() if block.gate_routed)
    return Program(
        program, plain.names, outputs, plain.example, expected, taus, gates, free, share, tied
    )


def coverage(model: nn.Module) -> float:
    """FLOPs of what blocks stand for, as a share of those of all linear layers of the model."""
    places = lifted_layers(model)
    here = sum(dense_flops(p) for p in places.values() if isinstance(p, DynkFFN) and not p.dense)
    inside = tuple(f"{name}." for name in places)
    rest = sum(
        2.0 * p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and not name.startswith(inside) and "embed" not in name
    )
    total = sum(dense_flops(p) for p in places.values()) + rest
    return here / total if total else 0.0


def tensors_of(kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the keyword arguments of a call, by their names in an artefact."""
    if all(isinstance(v, Tensor) and n.strip("_") == n for n, v in kwargs.items()):
        return dict(kwargs)  # as the rest would, at a hundredth of a small model's time
    found = [(k, v) for k, v in tree_flatten_with_path(dict(kwargs))[0] if isinstance(v, Tensor)]
    return dict(zip(_names([k for k, _ in found]), (v for _, v in found), strict=True))


def differences(
    names: Sequence[str], want: Sequence[Tensor], got: Sequence[Tensor]
) -> dict[str, dict[str, float]]:
    """Compare outputs; see :attr:`Report.errors`."""
    result = {}
    for name, a, b in zip(names, want, got, strict=True):
        if not a.is_floating_point():
            continue
        gap = (a - b).float().abs()
        norm = float(a.float().norm())
        result[name] = {
            "max": float(gap.max()) if gap.numel() else 0.0,
            "mean": float(gap.mean()) if gap.numel() else 0.0,
            "relative": float(gap.norm()) / max(norm, 1e-30),
        }
    return result


def check_floor(share: float, floor: float) -> None:
    """Refuse a model that is not worth an artefact.

    Raises:
        ExportError: Less than ``floor`` of the FLOPs are in converted blocks.
    """
    if share < floor:
        raise ExportError(
            f"only {share:.1%} of the FLOPs are in converted blocks, less than the floor of "
            f"{floor:.1%}; convert more of the model (projections), or lower the floor"
        )


def check_errors(
    errors: Mapping[str, Mapping[str, float]], tolerance: float, tied: Sequence[str]
) -> None:
    """Refuse an artefact that is not the model.

    Args:
        errors: By output; see :attr:`Report.errors`.
        tolerance: The largest relative one that is let pass.
        tied: Blocks in which a score tied with its limit.

    Raises:
        ExportError: An output differs by more than ``tolerance``, relatively.
    """
    cause = "Raise the tolerance only for storage narrower than float32."
    if tied:
        cause = (
            f"In {', '.join(tied)} a score ties with its limit in this example, so rounding "
            "decides which experts run: that may be all. Export with another example."
        )
    for name, e in errors.items():
        if not e["relative"] <= tolerance:
            raise ExportError(
                f"output {name} of the artefact differs from the model by {e['relative']:.1e} "
                f"(relative; largest {e['max']:.1e}), more than {tolerance:.0e}; nothing was "
                f"written. {cause}"
            )


@contextmanager
def watch_ties(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Note in which rows a score comes so near to its limit that rounding decides.

    Yields:
        A list that gets, for every call of a block, its name and the rows, bool ``[..]``.
    """
    found: list[tuple[str, Tensor]] = []

    def note(name: str, block: DynkFFN, x: Tensor) -> None:
        found.append((name, block.tied(x)))

    with looking(model, note):
        yield found


@torch.no_grad()
def tied_texts(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Texts of a batch in which a score of a block ties, for :func:`skimp.ir.measure.agree`.

    Returns:
        Bool ``[batch]``.
    """
    with watch_ties(model) as seen:
        model(**inputs)
    batch = len(next(iter(inputs.values())))
    found = torch.zeros(batch, dtype=torch.bool)
    for _, rows in seen:
        found |= rows.reshape(batch, -1).any(1).cpu()
    return found


def needs(extra: str, *packages: str) -> None:
    """Refuse early where packages lack.

    Raises:
        ExportError: One is not installed.
    """
    for package in packages:
        parts = package.split(".")
        if any(find_spec(".".join(parts[: i + 1])) is None for i in range(len(parts))):
            raise ExportError(f"this door needs `pip install {extra}`: there is no {package}")


def run_model(
    model: nn.Module, example: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Names of the tensors of a model's output, and these, in order."""
    with torch.no_grad():
        return _tensors(model(**example))


def _tensors(output: Any) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    found = [(path, v) for path, v in tree_flatten_with_path(output)[0] if isinstance(v, Tensor)]
    return _names([path for path, _ in found], "output"), tuple(v for _, v in found)


Metric = Callable[[Callable[..., Sequence[Tensor]]], float]
"""From a function of the keyword arguments to output tensors, to a number of the task."""
