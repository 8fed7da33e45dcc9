"""Balanced k-means: equal groups, stable ones, and no input that takes for ever."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimp.ir.errors import BadWeightsError
from skimp.passes import split as module
from skimp.passes.split import balanced_kmeans, stable_assignment


def points(kind, n, d, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return {
        "random": x,
        "mostly dead": torch.where(torch.arange(n)[:, None] < n // 4, x, 0),
        "all the same": x[:1].expand(n, d),
        "ranked": torch.stack([torch.ones(n), torch.arange(n) / n], -1),
    }[kind]


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["random", "mostly dead", "all the same", "ranked"]),
    clusters=st.integers(1, 12),
    capacity=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_every_cluster_holds_exactly_its_share(kind, clusters, capacity, seed):
    found = balanced_kmeans(points(kind, clusters * capacity, 5, seed), clusters, seed=seed)
    assert found.bincount(minlength=clusters).tolist() == [capacity] * clusters


@pytest.mark.parametrize("kind", ["random", "ranked"])
def test_nobody_would_rather_swap(kind):
    x = torch.nn.functional.normalize(points(kind, 96, 7 if kind == "random" else 2), dim=-1)
    affinity = x @ x[::8].T
    found = stable_assignment(affinity, 8)
    own = affinity.gather(1, found[:, None])
    weakest = torch.stack([own[found == c].min() for c in range(12)])
    assert not ((affinity > own) & (affinity > weakest)).any()


def test_neurons_that_point_the_same_way_share_an_expert():
    centres = torch.eye(6).repeat_interleave(4, 0) * torch.rand(24, 1).add(0.1)
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    best = max(
        len({(int(a), int(b) // 4) for a, b in zip(balanced_kmeans(centres[shuffled], 6, seed=s),
                                                   shuffled, strict=True)}) == 6
        for s in range(20)
    )  # fmt: skip
    assert best  # k-means depends on where it starts; of 20 starts one finds the six groups


def test_neurons_that_never_fire_share_experts():
    x = points("mostly dead", 96, 5)[torch.randperm(96, generator=torch.Generator().manual_seed(2))]
    found = balanced_kmeans(x, 12)
    dead = ~x.any(-1)
    assert len(set(found[~dead].tolist())) == 24 / 8  # no more experts than those that fire fill
    assert not balanced_kmeans(torch.zeros(96, 5), 12).bincount().sub(8).any()


@pytest.mark.parametrize("kind", ["mostly dead", "all the same"])
def test_points_with_the_same_wishes_cost_no_more_than_the_bound(kind, monkeypatch):
    """Unbounded, each round fills one of 300 clusters."""
    turns = []
    real = torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *a, **k: turns.append(1) or real(*a, **k))
    x = torch.nn.functional.normalize(points(kind, 1200, 4), dim=-1)
    found = stable_assignment(x @ x[::4].T, 4)
    assert 1 < len(turns) <= module.ROUNDS
    assert found.bincount(minlength=300).tolist() == [4] * 300


def test_sizes_that_do_not_divide():
    with pytest.raises(BadWeightsError, match="5 experts do not divide 12 neurons"):
        balanced_kmeans(torch.randn(12, 3), 5)
