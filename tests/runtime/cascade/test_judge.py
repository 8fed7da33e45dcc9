"""A judge that learns while it judges: its calls, its prompts, what it keeps and refuses."""

import asyncio
import json
import re

import pytest
from skimp.ir.errors import ArtefactError, CalibrationError
from skimp.runtime.cascade import judge_prompts as prompts
from skimp.runtime.cascade.endpoint import Endpoint
from skimp.runtime.cascade.judge import (
    Judge,
    MemberJudge,
    expected_calls,
    read_log,
    read_pairs,
    save_log,
    score,
)
from skimp.runtime.cascade.judge_prompts import FIRST_GUIDE, LEAST, MOST, Pair
from skimp.runtime.cascade.price import Price
from skimp.runtime.cascade.responses import ResponseCache
from skimp.runtime.cascade.trip import Entry

SUBSETS = ("Natural", *(f"Adversarial_{n}" for n in ("GPTInst", "GPTOut", "Manual", "Neighbor")))


def stage_of(prompt):
    starts = {
        "update": prompts._UPDATE,
        "condense": prompts._CONDENSE,
        "feedback": prompts._FEEDBACK,
        "vanilla": prompts._VANILLA,
    }
    for name, text in starts.items():
        if prompt.startswith(text):
            return name
    return "rubric" if prompts._RUBRIC_RULES in prompt else "judge"


def made(n=24, hard=3):
    """Pairs whose better answer is the longer one; of every so many, the first is preferred."""
    pairs, labels = [], {}
    for i in range(n):
        good, bad = f"good answer number {i} in full", f"bad {i}"
        kind = "hard" if i % hard == 0 else "easy"
        flip = i // 2 % 2
        pairs.append(Pair(f"p{i}", f"{kind} request {i}", *((bad, good) if flip else (good, bad))))
        labels[f"p{i}"] = "B" if flip else "A"
    return pairs, labels


class Scripted:
    """A judge that prefers what comes first in hard pairs until its guide says otherwise."""

    def __init__(self, update=None):
        self.seen, self.update = [], update or self.better

    def better(self, guide):
        return f"<guide>{guide}\nLook at substance, tip {len(guide)}.</guide>"

    def __call__(self, prompt):
        self.seen.append(prompt)
        stage = stage_of(prompt)
        if stage == "update":
            return self.update(re.search(r"<guide>\n(.*?)\n</guide>", prompt, re.DOTALL).group(1))
        if stage == "condense":
            return "<guide>" + "c" * 5000 + "</guide>"
        if stage == "feedback":
            return 'Well: {"score": 3, "label": "not sure", "tips": ["substance"]}'
        if stage == "rubric":
            return "steps, with substance" if "substance, tip" in prompt else "steps"
        good = prompt.index("good answer") < prompt.index("bad ")
        fooled = "hard request" in prompt and "with substance" not in prompt
        return "[[A]]" if fooled or good else "[[B]]"

    async def ask(self, stage, prompt):
        return self(prompt)


def run(judge, pairs):
    return asyncio.run(judge.judge(pairs))


@pytest.mark.parametrize(("n", "hard", "batch"), [(24, 3, 4), (24, 5, 4), (9, 2, 4), (8, 100, 3)])
def test_calls_are_those_of_the_formula(n, hard, batch):
    pairs, _ = made(n, hard)
    model = Scripted()
    done = run(Judge(model.ask, batch=batch), pairs)
    m = sum(i % hard == 0 for i in range(n))
    assert done.learned_from == m
    assert sum(done.calls.values()) == len(model.seen) == expected_calls(n, m, batch)
    assert done.calls["vanilla"] == 2 * n
    easy = [p for p in model.seen if "easy request" in p and stage_of(p) != "vanilla"]
    assert easy == []  # nothing more is asked where both orders agree
    frozen = run(Judge(model.ask, batch=batch, mode="frozen"), pairs)
    assert sum(frozen.calls.values()) == 2 * n + 2 * m
    full = run(Judge(model.ask, batch=batch, mode="full"), pairs)
    assert sum(full.calls.values()) == 3 * n + -(-n // batch)
    both = run(Judge(model.ask, batch=batch, both=True), pairs)
    assert sum(both.calls.values()) == expected_calls(n, m, batch) + m


@pytest.mark.parametrize(("name", "again"), [("GPT-4", 30), ("PaLM2", 119), ("ChatGPT", 143)])
def test_recorded_verdicts_split_llmbar_as_they_must(data, name, again):
    pairs, recorded, found = [], {}, 0
    for subset in SUBSETS:
        path = data / "llmbar" / subset / f"{name}.json"
        if not path.exists():
            pytest.skip(f"no {path}")
        for i, row in enumerate(json.loads(path.read_text())):
            pair = Pair(f"{subset}-{i}", row["input"], row["output_1"], row["output_2"])
            pairs.append(pair)
            results = row["results"][0]
            one, two = (results[k]["winner"] for k in ("swap = False", "swap = True"))
            found += not (one == two and one in ("1", "2"))
            letter = {"1": "A", "2": "B"}
            recorded[prompts.vanilla(pair)] = letter.get(one, "?")
            other = {"1": "B", "2": "A"}
            recorded.setdefault(prompts.vanilla(pair.swapped), other.get(two, "?"))
    asked = []

    async def ask(stage, prompt):
        asked.append(prompt)
        if stage == "vanilla":
            return f"[[{recorded[prompt]}]]"
        return "[[A]]"

    done = run(Judge(ask), pairs)
    assert len(pairs) == 419
    assert done.learned_from == found == again
    assert len(asked) == expected_calls(419, again, 4)
    assert len(asked) == pytest.approx(419 * (2 + again / 419 * (3 + 1 / 4)), abs=1)


def test_calls_and_cost_on_a_server(stub_module, tmp_path):
    """The same over HTTP; a second run asks nothing and comes to the same guide."""
    script = Scripted()

    class Provider(stub_module.Stub):
        async def complete(self, request):
            body = await request.json()
            self.calls[body["model"]] += 1
            assert body["temperature"] == 0
            choice = self.choice(0, script(body["messages"][-1]["content"]), True, body)
            usage = self.bill(body["model"], 11, 7)
            return stub_module.web.json_response({"choices": [choice], "usage": usage})

    pairs, _ = made(14, 2)
    with stub_module.Background() as background:
        provider = Provider()
        background.run(provider.listen())

        def judged(url):
            entry = Entry("j", Endpoint(url, "j"), Price(1.0, 2.0), retries=0)
            model = MemberJudge(entry, ResponseCache(tmp_path / "responses.jsonl"))

            async def work():
                done = await Judge(model, seed=1).judge(pairs)
                await entry.member.close()
                return done

            return asyncio.run(work()), model

        done, model = judged(provider.url)
        assert provider.calls["j"] == expected_calls(14, 7, 4) == 28 + 21 + 2
        assert model.spent == pytest.approx(51 * 25e-6)
        background.run(provider.runner.cleanup())
    again, model = judged("http://127.0.0.1:9/v1")  # nobody is there
    assert model.spent == 0
    assert again.verdicts == done.verdicts
    assert again.versions == done.versions


def test_no_label_reaches_a_prompt(tmp_path):
    pairs, labels = made()
    seen = []
    for turn in (dict(labels), dict.fromkeys(labels, "A")):
        path = tmp_path / "pairs.jsonl"
        rows = [
            {"id": p.id, "question": p.question, "a": p.a, "b": p.b, "label": turn[p.id]}
            | {"gold": "SENTINEL", "reason": "SENTINEL"}
            for p in pairs
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        read, found = read_pairs(path)
        assert found == turn
        model = Scripted()
        run(Judge(model.ask, both=True), read)
        seen.append(sorted(model.seen))
    assert seen[0] == seen[1]
    assert not any("SENTINEL" in p for p in seen[0])


def test_updates_that_lose_something_are_refused():
    pairs, _ = made()
    cases = {
        "no guide in the reply": lambda guide: "here is my guide",
        f"{LEAST} at least": lambda guide: "<guide>short</guide>",
    }
    for why, update in cases.items():
        done = run(Judge(Scripted(update).ask), pairs)
        assert all(why in v.status for v in done.versions[1:])
        assert len(done.versions) == 1 + 2
        assert done.guide.text == FIRST_GUIDE
        assert {v.version for v in done.verdicts} == {None, 0}


def test_a_guide_that_is_too_long_is_condensed_once_or_refused():
    pairs, _ = made(8, 2)
    model = Scripted(lambda guide: "<guide>" + "x" * (MOST + 1) + "</guide>")
    done = run(Judge(model.ask), pairs)
    assert done.calls["condense"] == 1
    assert done.guide.text == "c" * 5000
    model.__class__ = type("Stubborn", (Scripted,), {"__call__": _stubborn})
    done = run(Judge(model.ask), pairs)
    assert "at most" in done.versions[1].status
    assert done.guide.number == 0


def _stubborn(self, prompt):
    if stage_of(prompt) == "condense":
        return "<guide>" + "x" * (MOST + 1) + "</guide>"
    return Scripted.__call__(self, prompt)


def test_an_update_that_gets_anchors_wrong_is_taken_back():
    pairs, _ = made(16, 2)
    harm = lambda guide: f"<guide>{guide} CONFUSED</guide>"  # noqa: E731

    class Confused(Scripted):
        def __call__(self, prompt):
            if stage_of(prompt) == "rubric" and "CONFUSED" in prompt:
                return "confused steps"
            if stage_of(prompt) == "judge" and "confused steps" in prompt:
                return "[[A]]"
            return super().__call__(prompt)

    without = run(Judge(Confused(harm).ask), pairs)
    assert without.guide.number > 0
    done = run(Judge(Confused(harm).ask, anchors=3), pairs)
    assert done.guide.number == 0
    assert "0.000 of the anchors right, 1.000 before" in done.versions[1].status
    helped = run(Judge(Scripted().ask, anchors=3), pairs)
    assert [v.status for v in helped.versions[1:]] == ["kept", "kept"]
    assert helped.versions[-1].anchors == 1.0


def test_versions_are_logged_and_each_can_be_used_again(tmp_path):
    pairs, _ = made(40, 2)
    done = run(Judge(Scripted().ask), pairs)
    save_log(done, tmp_path / "log.json")
    versions = read_log(tmp_path / "log.json")
    assert versions == done.versions
    assert len(versions) == 1 + 5
    assert [v.parent for v in versions] == [None, 0, 1, 2, 3, 4]
    by_batch = [set(v.pairs) for v in versions[1:]]
    used = {v.id: v.version for v in done.verdicts if v.version is not None}
    assert all(used[i] == k for k, batch in enumerate(by_batch) for i in batch)  # one guide a batch
    again = run(Judge(Scripted().ask, mode="frozen", guide=versions[3].text), pairs)
    assert again.verdicts[0].winner == "A"
    told = json.loads((tmp_path / "log.json").read_text())
    told["versions"][2]["text"] += " changed"
    (tmp_path / "log.json").write_text(json.dumps(told))
    with pytest.raises(ArtefactError, match="changed by hand"):
        read_log(tmp_path / "log.json")


def test_a_coin_is_reported_and_consistency_is_of_one_prompt():
    pairs, labels = made(30, 3)
    done = run(Judge(Scripted().ask), pairs)
    found = score(done.verdicts, labels)
    assert found["rho"] == pytest.approx(1 / 3)
    assert found["consistency"] is found["pair_acc"] is None  # only one order was judged again
    assert found["null_mixed_consistency"] == pytest.approx(1 - 1 / 6)
    assert found["null"]["acc"] == pytest.approx((20 + 5) / 30)
    assert found["null"]["low"] < found["null"]["acc"] < found["null"]["high"]
    both = score(run(Judge(Scripted().ask, both=True), pairs).verdicts, labels)
    # the first batch is judged before anything is learned, so it depends on order as before
    assert both["consistency"] == both["pair_acc"] == pytest.approx(26 / 30)
    assert both["plain_consistency"] == pytest.approx(20 / 30)


def test_learning_is_what_helps_and_depends_on_the_order():
    pairs, labels = made(40, 2)
    learned, frozen, firsts = [], [], set()
    for seed in range(4):
        done = run(Judge(Scripted().ask, seed=seed), pairs)
        learned.append(score(done.verdicts, labels)["acc"])
        firsts.add(done.versions[1].pairs)
        still = run(Judge(Scripted().ask, seed=seed, mode="frozen"), pairs)
        assert [v.status for v in still.versions] == ["first"]
        frozen.append(score(still.verdicts, labels)["acc"])
    assert len(firsts) == 4
    assert len(set(frozen)) == 1
    assert min(learned) > max(frozen)


def test_verdicts_and_feedback_are_read_with_care():
    cases = {"[[A]]": "A", "[[A]] or [[B]]": None, "so [B]": "B", "[A] [B]": None, "A": None}
    cases |= {"[A], no, [[B]]": "B"}
    assert {t: prompts.read_verdict(t) for t in cases} == cases
    assert json.loads(prompts.read_feedback('ok {"score": 2} bye')) == {"score": 2}
    assert prompts.read_feedback("just words {") == "just words {"
    assert len(FIRST_GUIDE) >= LEAST
    with pytest.raises(CalibrationError, match="no such judge"):
        Judge(Scripted().ask, mode="other")


def test_a_judge_that_is_down_is_no_verdict(provider):
    stub = provider()
    entry = Entry("j", Endpoint(stub.url, "j"), Price(1.0, 2.0), retries=1)

    async def work(text):
        try:
            return await Judge(MemberJudge(entry)).judge([Pair("1", text, "a", "b")])
        finally:
            await entry.member.close()

    with pytest.raises(CalibrationError, match="did not answer \\(500"):
        asyncio.run(work("j=500"))
    assert stub.calls["j"] >= 2  # it was asked again first
