"""Trees and their sizes against brute force; curves decide; the rate finds its fixed point."""

import itertools
import math

import pytest
import torch
from skimp.runtime.tree.calibrate import Calibration, Draft, Hindsight, Rate
from skimp.runtime.tree.node import Children, Tree
from skimp.runtime.tree.policy import CostPolicy, best_size, ordered, pooled
from skimp.runtime.tree.published import CastPolicy, FixedPolicy, keep_while


def random_draft(n, generator):
    tree = Tree.of(0)
    for i in range(n):
        parent = int(torch.randint(len(tree), (), generator=generator))
        tree.add(parent, 100 + i, float(torch.rand((), generator=generator)))
    return Draft(tree, [[] for _ in range(len(tree))])


def closed_sets(drafts, n):
    """Every set of n nodes, over all rows, that holds the parents of its nodes."""
    nodes = [(r, i) for r, d in enumerate(drafts) for i in range(1, len(d.tree))]
    for chosen in itertools.combinations(nodes, n):
        there = set(chosen)
        if all((p := drafts[r].tree.parents[i]) == 0 or (r, p) in there for r, i in chosen):
            yield chosen


@pytest.mark.parametrize("seed", range(6))
def test_the_likeliest_nodes_are_the_best_closed_set_of_each_size(seed):
    g = torch.Generator().manual_seed(seed)
    drafts = [random_draft(n, g) for n in ((10,), (4, 6), (3, 3, 4))[seed % 3]]
    ranked = pooled(drafts, 99)
    for n in range(1, 7):
        best = max(sum(drafts[r].tree.values[i] for r, i in s) for s in closed_sets(drafts, n))
        assert sum(v for v, _, _ in ranked[:n]) == pytest.approx(best)
        rows = ordered(drafts, ranked[:n])
        for draft, nodes in zip(drafts, rows, strict=True):
            assert nodes[0] == 0
            for place, node in enumerate(nodes[1:], 1):
                assert draft.tree.parents[node] in nodes[:place]
        assert sum(map(len, rows)) == n + len(drafts)


CURVES = {
    "flat": lambda n: 1.0,
    "linear": lambda n: float(n),
    "steps": lambda n: 1.0 + 0.6 * math.ceil((n - 1) / 8),
    "inversion": lambda n: {32: 8.0}.get(n, 1.0 + 0.15 * n - (4.0 if n > 32 else 0.0)),
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("rows", [1, 8])
def test_the_size_is_the_best_of_all(curve, rows):
    g = torch.Generator().manual_seed(1)
    chances = sorted(torch.rand(60, generator=g).tolist(), reverse=True)
    cost = CURVES[curve]
    for rate in (0.1, 0.7, 2.0):
        gains = [sum(chances[:n]) - rate * cost(rows + n) for n in range(61)]
        size = best_size(chances, rows, rate, cost)
        assert gains[size] == pytest.approx(max(gains))


class Steady:
    """Two children of each node, right with chance .8 and .1, at a price."""

    name = "steady"

    def __init__(self, price=0.0, chance=0.8):
        self.price, self.chance = price, chance

    def expand(self, trees, nodes):
        return [Children([1, 2], [self.chance, 0.1]) for _ in nodes]

    def seconds(self, nodes):
        return self.price * nodes


def sizes(curve, drafter=None, rows=1, steps=60, depth=200):
    """Nodes verified per row, once the policy has settled on a curve, and tokens per second."""
    drafter = drafter or Steady()
    policy = CostPolicy([drafter], curve)
    policy.begin(rows)
    g, found, tokens, time = torch.Generator().manual_seed(0), [], 0, 0.0
    for step in range(steps):
        drafts = policy.draft([0] * rows, [depth] * rows)
        chosen = policy.select(drafts)
        texts = []
        for nodes, draft in zip(chosen, drafts, strict=True):
            text, node = [], 0
            while True:  # tokens: 1 with the drafter's chance, 2 with .1, else 3
                u = float(torch.rand((), generator=g))
                token = 1 if u < drafter.chance else 2 if u < drafter.chance + 0.1 else 3
                text.append(token)
                node = draft.tree.children[node].get(token)
                if node not in nodes:
                    break
            texts.append(text)
        taken = curve(sum(map(len, chosen)))
        policy.learn(drafts, texts, taken)
        if step >= steps // 2:
            found.append(sum(map(len, chosen)) - rows)
            tokens, time = tokens + sum(map(len, texts)), time + taken
    return found, tokens / time


def test_no_drafter_expands_a_node_twice():
    """Also where another one raises the chance of a node that waits to be expanded."""
    asked = []

    class Noting(Steady):
        def expand(self, trees, nodes):
            asked.append([(id(self), *at) for at in nodes])
            return super().expand(trees, nodes)

    # the first is asked first, being cheaper; the second has more faith in the same tokens
    drafters = [Noting(chance=0.5, price=0.001), Noting(chance=0.8, price=0.01)]
    policy = CostPolicy(drafters, lambda n: 1.0 + 0.001 * n)
    policy.begin(1)
    for _ in range(30):
        asked.clear()
        policy.draft([0], [6])
        every = [at for nodes in asked for at in nodes]
        assert len(every) == len(set(every))
        assert len({drafter for drafter, _, _ in every}) == 2


def test_a_flat_curve_is_filled_and_a_linear_one_left_empty():
    assert min(sizes(CURVES["flat"])[0]) >= 30
    assert max(sizes(CURVES["linear"])[0]) == 0


def test_steps_are_filled_to_their_edge_and_the_cheap_side_of_an_inversion_is_chosen():
    found, _ = sizes(CURVES["steps"])
    assert {(n + 1) % 8 for n in found} == {1}  # 9, 17, .. rows
    dear = dict.fromkeys(range(2, 9), 3.0)  # 9 rows are cheaper than 2 to 8
    found, _ = sizes(lambda n: dear.get(n, 1.0 if n < 2 else 1.5 + 0.3 * (n - 9)))
    assert min(found) >= 8


def test_a_curve_that_gives_nothing_is_answered_with_plain_decoding_and_no_drafting():
    drafter = Steady(price=0.5, chance=0.3)
    calls = [0]
    expand = drafter.expand
    drafter.expand = lambda *a: calls.__setitem__(0, calls[0] + 1) or expand(*a)
    found, rate = sizes(lambda n: 1.0 + 0.5 * (n - 1), drafter, steps=400)
    assert max(found) == 0
    assert calls[0] < 20  # tried again now and then, ever more rarely
    assert rate == pytest.approx(1.0)


def test_another_device_gets_another_size_though_nothing_is_configured():
    slow, _ = sizes(lambda n: 1.0 + 0.25 * (n - 1))
    fast, _ = sizes(lambda n: 1.0 + 0.005 * (n - 1))
    assert max(slow) < min(fast)


@pytest.mark.parametrize("slope", [0.02, 0.1, 0.4])
def test_the_rate_reaches_the_best_fixed_size(slope):
    """Within 2 % of the best chain in hindsight, of expected tokens over seconds."""

    def curve(n):
        return 1.0 + slope * (n - 1)

    best = max(
        sum(0.8**i for i in range(n + 1)) / curve(n + 1) for n in range(40)
    )  # chains; a second child of chance .1 is worth less at these slopes
    found, _ = sizes(curve, steps=400)
    common = max(set(found), key=found.count)
    got = sum(0.8**i for i in range(common + 1)) / curve(common + 1)
    assert got >= 0.98 * best


def test_a_batch_is_filled_where_it_pays_not_evenly():
    sure, poor = random_draft(0, None), random_draft(0, None)
    node = 0
    for i in range(6):
        node = sure.tree.add(node, i, 0.95)
    node = 0
    for i in range(6):
        node = poor.tree.add(node, i, 0.2)
    policy = CostPolicy([Steady()], lambda n: 1.0 + 0.1 * n)
    chosen = policy.select([sure, poor])
    assert len(chosen[0]) == 7
    assert len(chosen[1]) <= 2


def test_algorithm_1_keeps_what_pays_since_the_last_kept_and_scans_on():
    gains, costs = [1.0, 1.2, 1.3, 4.0], [0.1, 0.2, 0.3, 0.5]
    assert keep_while(gains, costs, 4) == 4  # the third does not pay, the fourth does
    assert keep_while(gains[:3], costs[:3], 4) == 1
    assert keep_while(gains, costs, 20) == 0


def test_cast_and_the_fixed_tree_keep_their_shape():
    drafter = Steady(price=0.01)
    fixed = FixedPolicy([drafter], CURVES["linear"], size=12, depth=4, width=3)
    fixed.begin(2)
    drafts = fixed.draft([0, 0], [10, 2])
    assert [len(x) for x in fixed.select(drafts)] == [12, 7]  # 6 nodes are all there are to depth 2
    assert max(drafts[0].tree.depths) == 4
    assert max(drafts[1].tree.depths) == 2
    cheap = CastPolicy([drafter], lambda n: 1.0 + 0.001 * n)
    dear = CastPolicy([drafter], lambda n: 1.0 + 1.0 * n)
    for policy in (cheap, dear):
        policy.begin(1)
    count = [len(p.select(p.draft([0], [10]))[0]) for p in (cheap, dear)]
    assert count[0] > 10
    assert count[1] == 1


def test_proposals_are_judged_by_the_text_though_nothing_was_verified():
    calibration = Calibration()
    hindsight = Hindsight(calibration)
    hindsight.begin(1)
    key = Calibration.key(0, 0, 0.5, 0, 0)
    assert calibration.chance(key, 0.5) == pytest.approx(0.5)
    for _ in range(200):
        draft = Draft(Tree.of(7))
        draft.tree.add(0, 8, 0.5)
        draft.keys.append([key])
        child = draft.tree.add(1, 9, 0.5)
        draft.keys.append([Calibration.key(0, 0, 0.5, 0, 1)])
        assert child == 2
        hindsight.observe(0, draft, [8])  # the step gave one token: the child's turn is to come
        hindsight.observe(0, Draft(Tree.of(8)), [5])
    assert calibration.chance(key, 0.5) > 0.9  # 8 came each time
    assert calibration.chance(Calibration.key(0, 0, 0.5, 0, 1), 0.5) < 0.2  # 9 never did


def test_the_rate_forgets_and_is_no_less_than_plain_decoding():
    rate = Rate(memory=10)
    assert rate.value(50.0) == 50.0
    for _ in range(100):
        rate.observe(4, 0.02)
    assert rate.value(50.0) == pytest.approx(200)
    for _ in range(100):
        rate.observe(1, 0.02)
    assert rate.value(10.0) == pytest.approx(50, rel=0.02)
