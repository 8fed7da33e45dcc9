"""Put the blocks of a converted graph into the module tree that the graph came from.

    mlp, q_proj = DynkFFN               where a module is the whole site
    dense, output.dense = Lead, Follow  where only its linears are modules of their own

The first linear then computes the block, the last gives out the result, and what the model does to
hidden activations in between is done to one column of zeros.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..ir.block import DynkFFN, Projection
from ..ir.errors import NothingToConvertError, VerificationError
from ..ir.site import FFNSite, ProjectionSite
from .base import first_tensor
from .convert import traceable
from .lift import blocks
from .place import Place

TOLERANCE = 1e-4
"""Relative error allowed between a graph and its module form."""


class Lead(nn.Module):
    """In the place of the first linear of a site: compute the block, keep the result.

    Args:
        block: The block.
        width: Columns of zeros to hand on; more than one where the model cuts them into halves.
    """

    def __init__(self, block: DynkFFN, width: int) -> None:
        super().__init__()
        self.block = block
        self.width = width
        self.result: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """What code that asks for a linear's dtype or device may look at."""
        return self.block.w_in

    def forward(self, x: Tensor) -> Tensor:
        """``[.., d] -> [.., width]``, zeros."""
        self.result = self.block(x)
        return x.new_zeros((*x.shape[:-1], self.width))


class Follow(nn.Module):
    """In the place of a later linear of a site.

    Args:
        lead: The first; it owns the block.
        last: Give out its result; otherwise hand on zeros.
    """

    def __init__(self, lead: Lead, last: bool) -> None:
        super().__init__()
        self._lead = [lead]  # in a list: the block belongs to one module only
        self.last = last

    @property
    def weight(self) -> Tensor:
        """See :class:`Lead`."""
        return self._lead[0].weight

    def forward(self, h: Tensor) -> Tensor:
        """``[.., width] -> [.., d_out]`` if it is the last, else ``[.., width]``."""
        lead = self._lead[0]
        if not self.last:
            return h.new_zeros((*h.shape[:-1], lead.width))
        result, lead.result = lead.result, None
        assert result is not None
        return result


def graft(gm: GraphModule, model: nn.Module, example: Mapping[str, Any]) -> nn.Module:
    """A copy of a model whose feed-forward networks are the blocks of a converted graph.

    Args:
        gm: What :func:`skimp.convert` or :func:`skimp.load` gave.
        model: The model it came from, or another with the same architecture.
        example: Keyword arguments of one call, on which the two forms are compared.

    Returns:
        The module tree in evaluation mode, with the weights of ``gm``.

    Raises:
        NothingToConvertError: A block has no place among the modules; says why.
        VerificationError: The two forms differ, or ``model`` is of another architecture.
    """
    found = located(gm)
    tree = copy.deepcopy(model).eval()
    tree.requires_grad_(False)
    trained = gm.state_dict()
    for name, (site, place) in found.items():
        part = gm.get_submodule(name)
        if isinstance(part, DynkFFN):
            swap(tree, place, copy.deepcopy(part))
        elif isinstance(part, Projection) and isinstance(site, ProjectionSite):  # stayed linear
            weight = part.weight.detach()
            trained[site.weight] = weight.T if site.transposed else weight
            if site.bias is not None and part.bias is not None:
                trained[site.bias] = part.bias.detach()
    for name, tensor in tree.state_dict(keep_vars=True).items():
        if name not in trained:
            continue
        if trained[name].shape != tensor.shape:
            raise VerificationError(f"{name} differs in shape: another architecture was converted")
        with torch.no_grad():
            tensor.copy_(trained[name])
    inputs = traceable(example)
    with torch.no_grad():
        want, got = first_tensor(gm(**inputs)), first_tensor(tree(**inputs))
    error = float((got - want).float().norm() / want.float().norm().clamp_min(1e-30))
    if not error <= TOLERANCE:
        raise VerificationError(
            f"the module form of {type(model).__name__} differs from the graph by {error:.1e}; "
            "pass the model that was converted, or keep the graph with skimp.save"
        )
    return tree


def located(gm: GraphModule) -> dict[str, tuple[FFNSite | ProjectionSite, Place]]:
    """The blocks of a graph by name: what they were made of, and their place in the module tree.

    And the projections that could have become blocks and stayed linear.

    Raises:
        NothingToConvertError: No blocks, or one that has no place.
    """
    result: dict[str, tuple[FFNSite | ProjectionSite, Place]] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module" or "skimp.place" not in node.meta:
            continue
        place: Place = node.meta["skimp.place"]
        if not place.paths:
            raise NothingToConvertError(
                f"{node.target} cannot be put into the module tree: {place.reason}. "
                "Keep the graph form, with skimp.save and skimp.load."
            )
        result[str(node.target)] = (node.meta["skimp.site"], place)
    if missing := blocks(gm).keys() - result.keys():
        raise NothingToConvertError(f"no place in the module tree is known of {sorted(missing)}")
    if not result:
        raise NothingToConvertError("the graph holds no block; convert the model first")
    return result


def swap(tree: nn.Module, place: Place, block: DynkFFN) -> None:
    """Put a block into a module tree, in place.

    Raises:
        VerificationError: The tree has no such module.
    """
    try:
        if place.whole:
            tree.set_submodule(place.paths[0], block, strict=True)
            return
        lead = Lead(block, place.width)
        tree.set_submodule(place.paths[0], lead, strict=True)
        for path in place.paths[1:]:
            tree.set_submodule(path, Follow(lead, path == place.paths[-1]), strict=True)
    except AttributeError as error:
        raise VerificationError(
            f"the model has no module {error}: another architecture was converted"
        ) from error
