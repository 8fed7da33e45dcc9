"""Routers on worlds of known optimum: what they reach, and what they cannot."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")
pytest.importorskip("sb3_contrib")
from skimp.ir.errors import ArtefactError, CalibrationError
from skimp.runtime.cascade.embed import Remembered, TfIdf
from skimp.runtime.cascade.policy import Hop, Serve, load_policy
from skimp.runtime.cascade.router import Plan, save_router
from skimp.runtime.cascade.router_baselines import all_ways, play, verdict, walk
from skimp.runtime.cascade.router_env import RouterEnv
from skimp.runtime.cascade.router_train import Bound, Training, build, scaled, train

QUICK = Training(steps=6144, width=64, rate=2e-3, rollout=512, batch=128, epochs=6)


def tfidf(world):
    return Remembered(TfIdf.fit([q.text for q in world.questions]))


def returns(world, router, rows):
    ways = play(world, router, rows)
    return float(
        np.mean([walk(world, router.plan, q, p)[2] for q, p in zip(rows, ways, strict=True)])
    )


@pytest.fixture(scope="module")
def planned(worlds):
    """Two hops over three members, where one ordered pair alone solves a class of queries."""
    world = worlds.world()
    router, record = build(world, Plan(hops=2, lam=0.1), Bound(), QUICK, embed="tfidf")
    return world, router, record


def test_two_hops_reach_the_optimum_where_one_cannot(planned):
    world, router, record = planned
    against = record["against"]
    assert against["router"]["value"]["mean"] >= 0.95 * against["oracle"]["value"]["mean"]
    programs = [i for i, q in enumerate(world.questions) if q.id.startswith("program")]
    ways = all_ways(world, router.plan, programs)
    one = ways.columns([1])
    assert ways.quality[:, one].max() == 0  # no member alone, hindsight included
    solving = [p for j, p in enumerate(ways.paths) if ways.quality[:, j].any()]
    assert solving == [(0, 1)]
    assert set(play(world, router, programs)) == {(0, 1)}


def test_it_beats_every_fixed_sequence_and_says_so(planned):
    _, _, record = planned
    against = record["against"]
    best = max(v["value"] for v in against["sequences"].values())
    assert len(against["sequences"]) == 9
    assert against["router"]["value"]["mean"] > best + 0.2
    said = record["verdicts"]
    assert [said[k] for k in ("best-single", "best-sequence", "random")] == ["better"] * 3
    assert said["knn"] != "worse"
    assert record["split"]["leaks"] == 18  # questions that differ by a number are as good as seen
    assert verdict({"low": -0.1, "high": 0.1, "mean": 0.05}) == "no different"


def test_a_higher_price_of_cost_buys_less_until_the_cheapest_is_left(worlds):
    world = worlds.world(45, worlds.graded)
    memory, rows = tfidf(world), range(45)
    curve = []
    for lam in (0.0, 1.8, 50.0):
        plan = scaled(world, Plan(hops=1, lam=lam), rows)
        router = train(world, plan, rows, memory, replace(QUICK, steps=2560))
        done = [
            walk(world, plan, q, p) for q, p in zip(rows, play(world, router, rows), strict=True)
        ]
        curve.append((np.mean([d[0] for d in done]), np.mean([d[1] for d in done])))
    quality, cost = zip(*curve, strict=True)
    assert list(quality) == sorted(quality, reverse=True)
    assert list(cost) == sorted(cost, reverse=True)
    assert quality[0] == 1.0
    assert quality[0] > quality[1]
    assert cost[-1] == pytest.approx(worlds.COSTS["writer"])


@pytest.mark.filterwarnings("ignore:.*A Box observation space")  # states have no bounds to tell
@pytest.mark.parametrize("stop", [False, True])
def test_the_environment_is_what_gymnasium_expects(worlds, stop):
    from gymnasium.utils.env_checker import check_env
    from stable_baselines3.common.env_checker import check_env as sb3_check

    world = worlds.world(6)
    env = RouterEnv(world, Plan(hops=2), tfidf(world), range(6), seed=3)
    check_env(env, skip_render_check=True)
    sb3_check(env)
    masked = RouterEnv(world, Plan(hops=2, stop=stop), tfidf(world), range(6), absent=0.9)
    for seed in range(20):
        masked.reset(seed=seed)
        there = masked.action_masks()
        assert there[:3].any()
        assert not stop or not there[3]
        masked.step(int(np.flatnonzero(there)[0]))
        assert not stop or masked.action_masks()[3]


def test_names_of_members_are_only_names(worlds, planned):
    """In another order the same states and rewards come up, and the same members are chosen."""
    world, router, _ = planned
    order = [2, 0, 1]
    other = worlds.world(members=[worlds.NAMES[i] for i in order])
    at = {m: i for i, m in enumerate(order)}
    a, b = (RouterEnv(w, router.plan, router.embedder, range(9)) for w in (world, other))
    for q in range(9):
        for path in ((0, 1), (2, 2), (1, 0)):
            states = [a.reset(options={"question": q})[0], b.reset(options={"question": q})[0]]
            np.testing.assert_array_equal(*states)
            for m in path:
                one, two = a.step(m), b.step(at[m])
                np.testing.assert_array_equal(one[0], two[0])
                assert one[1:4] == two[1:4]
    turned = router.permuted(order)
    mine, theirs = play(world, router, range(60)), play(other, turned, range(60))
    assert [tuple(at[m] for m in p) for p in mine] == theirs


def test_blind_to_the_context_it_gets_less(worlds, planned):
    world, router, _ = planned
    rows = range(60)
    blind = train(world, router.plan, rows, router.embedder, QUICK, blind=["context"])
    blank = Remembered(_Blank(router.embedder.inner.dim))
    assert returns(world, replace(blind, embedder=blank), rows) < returns(world, router, rows) - 0.2


class _Blank:
    record, tensors = {}, {}

    def __init__(self, dim):
        self.dim = dim

    def __call__(self, texts):
        return np.zeros((len(texts), self.dim), np.float32)


def test_the_cost_so_far_matters_under_a_cap_alone(worlds):
    world = worlds.capped()
    memory, rows = tfidf(world), range(40)
    found = {}
    for cap in (4.0, math.inf):
        for blind in ((), ("cost",)):
            plan = Plan(hops=2, lam=0.01, scale=3.0, cap=cap)
            how = replace(QUICK, steps=4096 if cap == 4.0 else 1536)
            router = train(world, plan, rows, memory, how, blind=blind)
            if blind:  # it must not see in service what it never saw
                weight = router.layers[0][0].copy()
                weight[:, -2] = 0
                router = replace(router, layers=((weight, router.layers[0][1]), *router.layers[1:]))
            found[cap, blind] = returns(world, router, rows)
    assert found[4.0, ()] > found[4.0, ("cost",)] + 0.1
    assert found[math.inf, ()] == pytest.approx(found[math.inf, ("cost",)], abs=0.02)


def test_the_file_serves_what_was_trained_and_holds_no_pickle(planned, tmp_path):
    world, router, record = planned
    path = tmp_path / "router.json"
    kept = {k: v for k, v in record.items() if k != "feasible"}
    save_router(router, kept, path)
    loaded = load_policy(path, "mine")
    rows = range(len(world.questions))
    assert play(world, loaded, rows) == play(world, router, rows)
    assert (loaded.name, loaded.members, loaded.bound) == ("mine", _names(world), None)
    for file in tmp_path.iterdir():
        assert b"\x80\x04" not in file.read_bytes()[:2]
        assert file.suffix in (".json", ".safetensors")
    # the policy's `next` sees the same states as training's environment
    for q in rows[:6]:
        request = {"messages": list(world.questions[q].messages)}
        hops, cost = [], 0.0
        for _ in range(2):
            step = loaded.next(request, hops)
            member = _names(world).index(step.member)
            told = world.after(q, (*(_names(world).index(h.member) for h in hops), member))
            cost += told.cost
            text = json.dumps({"role": "assistant", "content": told.text})
            hops.append(Hop(step.member, (told.answer,), told.confidence, text, cost))
        assert loaded.next(request, hops) == Serve(1)
        way = tuple(_names(world).index(h.member) for h in hops)
        assert way == play(world, router, [q])[0]
    next(tmp_path.glob("*.safetensors")).write_bytes(b"other")
    with pytest.raises(ArtefactError, match="not what"):
        load_policy(path)


def _names(world):
    return tuple(m.name for m in world.members)


def test_a_member_that_is_gone_or_fails_is_not_asked(planned):
    world, router, _ = planned
    request = {"messages": list(world.questions[0].messages)}  # a program
    assert router.next(request, []).member == "coder"
    assert router.among(["writer", "other"]).next(request, []).member == "writer"
    with pytest.raises(ArtefactError, match="none of which"):
        router.among(["other"])
    failed = [Hop("coder", (), 0.0, None)]
    assert router.next(request, failed).member != "coder"
    everyone = [Hop(n, (), 0.0, None) for n in _names(world)]
    assert router.next(request, everyone) is None
    said = Hop("coder", (None,), 0.0, '{"content": "x"}')
    assert router.next(request, [said, *everyone[1:], everyone[0]]) == Serve(0)


def test_stopping_is_learned_where_one_hop_is_enough(worlds):
    world = worlds.world()
    plan = Plan(hops=2, lam=0.3, stop=True)
    router, record = build(world, plan, Bound(), QUICK, embed="tfidf")
    against = record["against"]
    assert against["router"]["value"]["mean"] >= 0.95 * against["oracle"]["value"]["mean"]
    lengths = {len(p) for p in play(world, router, range(60))}
    assert lengths == {1, 2}
    with pytest.raises(ValueError, match="mask this action"):
        RouterEnv(world, router.plan, router.embedder, [0]).step(3)


def test_the_bound_is_that_of_conformal_calibration(worlds):
    world = worlds.world(90, worlds.graded)
    how = replace(QUICK, steps=1024)
    for budget, feasible in ((1.0, True), (1e-9, False)):
        _, record = build(world, Plan(hops=1), Bound(budget, 0.1), how, embed="tfidf")
        assert record["feasible"] is feasible
        costs = np.array(record["calibration_costs"])
        assert record["least_budget"] in costs
        assert (costs <= record["least_budget"]).mean() >= 0.9
    with pytest.raises(CalibrationError, match="too few"):
        build(worlds.world(2), Plan(hops=1), embed="tfidf")
