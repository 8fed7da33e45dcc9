"""Split a feed-forward network into experts of equal size.

Neurons that look for the same thing should live in the same expert, so that a token needs few of
them. Balanced k-means groups neurons by direction (D2DMoE, section 3.1; MoEfication), here with
deferred acceptance for the balance: neurons propose to the nearest centroid that has not refused
them, a full centroid keeps its closest. The result is stable (no neuron and centroid would both
rather have each other) and each round is one vectorised step, near n*E cost; the constrained
k-means that the paper's code uses solves a flow problem, near n**4. Weights and activations take
10 to 40 rounds. Points that all wish for the same would fill one cluster a round: after `ROUNDS` of
them the rest go where there is room.

A neuron that never fires, a row of zeros, has no direction. Such neurons share experts, which a
router then never chooses, and they fill what the others leave.
"""

import torch
from torch import Tensor

from ..ir.block import DynkFFN
from ..ir.errors import BadWeightsError

ROUNDS = 64
"""Rounds of proposals per assignment."""


def balanced_kmeans(
    points: Tensor, clusters: int, *, iterations: int = 10, seed: int = 0
) -> Tensor:
    """Cluster points by direction into groups of exactly equal size.

    Args:
        points: ``[n, d]``; rows are L2-normalised first. Rows of zeros fill the last clusters.
        clusters: Number of groups, E; divides n.
        iterations: Lloyd iterations.
        seed: Of the initial centroids.

    Returns:
        Cluster of each point, int64 ``[n]``; every cluster holds ``n / E`` points.

    Raises:
        BadWeightsError: E does not divide n.
    """
    n = points.shape[0]
    if n % clusters:
        raise BadWeightsError(f"{clusters} experts do not divide {n} neurons evenly")
    capacity = n // clusters
    unit = torch.nn.functional.normalize(points.detach().float(), dim=-1)
    live = unit.any(-1)
    unit = unit[live]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(unit), generator=generator)
    centroids = unit[order[: -(-len(unit) // capacity)].to(unit.device)]
    assigned = torch.full((len(unit),), -1, dtype=torch.int64, device=unit.device)
    for _ in range(iterations if len(unit) else 0):
        new = stable_assignment(unit @ centroids.T, capacity)
        if torch.equal(new, assigned):
            break
        assigned = new
        sums = torch.zeros_like(centroids).index_add_(0, assigned, unit)
        centroids = torch.nn.functional.normalize(sums, dim=-1)
    room = capacity - torch.bincount(assigned, minlength=clusters)
    result = torch.empty(n, dtype=torch.int64, device=unit.device)
    result[live] = assigned
    result[~live] = torch.arange(clusters, device=unit.device).repeat_interleave(room)
    return result


def stable_assignment(affinity: Tensor, capacity: int) -> Tensor:
    """Match points to clusters of fixed capacity by deferred acceptance (Gale and Shapley, 1962).

    Args:
        affinity: ``[n, E]``, larger is closer; ``n <= E * capacity``.
        capacity: Most points of a cluster.

    Returns:
        Cluster of each point, int64 ``[n]``; stable if :data:`ROUNDS` sufficed.
    """
    n, clusters = affinity.shape
    wish = affinity.clone()
    choice = wish.argmax(-1)
    for turn in range(ROUNDS):
        # Order by cluster, then by closeness: position within the cluster decides who stays.
        closeness = affinity.gather(1, choice[:, None]).squeeze(1)
        order = closeness.argsort(descending=True, stable=True)
        order = order[choice[order].argsort(stable=True)]
        counts = torch.bincount(choice, minlength=clusters)
        starts = counts.cumsum(0) - counts
        position = torch.arange(n, device=order.device) - starts[choice[order]]
        refused = order[position >= capacity]
        if refused.numel() == 0:
            break
        if turn == ROUNDS - 1:
            room = (capacity - counts).clamp_min(0)
            each = torch.arange(clusters, device=room.device)
            choice[refused] = each.repeat_interleave(room)[: len(refused)]
            break
        wish[refused, choice[refused]] = -torch.inf
        # A centroid that is full of closer points will refuse; spare the round trip.
        full = counts >= capacity
        worst = torch.full((clusters,), torch.inf, device=affinity.device)
        kept = order[position < capacity]
        worst.scatter_reduce_(0, choice[kept], closeness[kept], "amin")
        worst[~full] = -torch.inf
        open_to = wish[refused].masked_fill(affinity[refused] < worst, -torch.inf)
        choice[refused] = open_to.argmax(-1)
    return choice


def permute(block: DynkFFN, order: Tensor) -> None:
    """Reorder the hidden neurons in place; the function of the block at tau = 0 stays the same.

    Args:
        block: The block.
        order: Permutation of the neurons, int64 ``[d_ff]``; new neuron ``i`` is old ``order[i]``.
    """
    with torch.no_grad():
        for parameter in (block.w_in, block.b_in, block.w_gate, block.b_gate, block.w_out):
            if parameter is not None:
                parameter.copy_(parameter[order])


def split(block: DynkFFN, *, points: Tensor | None = None, seed: int = 0) -> Tensor:
    """Make the neurons of each expert adjacent, in place.

    Args:
        block: The block; its ``expert_size`` sets the size of the experts.
        points: What to cluster, ``[d_ff, m]``; by default the rows of ``w_gate`` of a gated
            network (its sparse branch), else of ``w_in``.
        seed: Of the clustering.

    Returns:
        The permutation applied, int64 ``[d_ff]``.
    """
    if points is None:
        points = block.w_in if block.w_gate is None else block.w_gate
    order = balanced_kmeans(points, block.experts, seed=seed).argsort(stable=True)
    permute(block, order)
    return order
