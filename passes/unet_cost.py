"""What pruning and sparse experts save together, of one call of a U-Net."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from ..ir.block import DynkFFN, Projection
from ..ir.cost import dense_flops, spent_flops
from .base import watch
from .lift import lifted_layers


def joint(
    report: Mapping[str, Any], converted: GraphModule, data: Sequence[Any]
) -> dict[str, float]:
    """FLOPs of a teacher, of its pruned student, and of that student with sparse experts.

    Every block counts with the rows that it really gets: those at a high resolution get many times
    the rows of those at a low one. Routers are included.

    Args:
        report: Of :func:`skimp.passes.prune_unet.prune`.
        converted: What :func:`skimp.convert` made of the student.
        data: Calls of the shapes that the teacher was captured with; means over them.

    Returns:
        FLOPs ``teacher``, ``pruned`` and ``sparse``; ``pruned left`` and ``sparse left`` as shares
        of the teacher's, ``converted`` the share of the student's that lies in blocks, and
        ``blocks left`` what of that is spent.
    """
    dense: dict[str, float] = defaultdict(float)
    spent: dict[str, float] = defaultdict(float)

    def look(name: str, place: DynkFFN | Projection, x: Tensor) -> None:
        k = None
        if isinstance(place, DynkFFN) and not place.dense:
            k = float(place.selected(x).float().sum(-1).mean())
        dense[name] += len(x) * dense_flops(place) / len(data)
        spent[name] += len(x) * spent_flops(place, k) / len(data)

    for _ in watch(converted, data, look, list(lifted_layers(converted))):
        pass
    teacher, pruned = (float(report["flops"][n]) for n in ("teacher", "student"))
    before, after = sum(dense.values()), sum(spent.values())
    sparse = pruned - before + after
    return {
        "teacher": teacher,
        "pruned": pruned,
        "sparse": sparse,
        "pruned left": pruned / teacher,
        "sparse left": sparse / teacher,
        "converted": before / pruned,
        "blocks left": after / before,
    }
