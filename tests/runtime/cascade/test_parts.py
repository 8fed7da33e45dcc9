"""Extractors, drift monitors and the commands."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimp.cli import app
from skimp.ir.errors import CalibrationError
from skimp.runtime.cascade import wire
from skimp.runtime.cascade.drift import ExceedanceMonitor, ExchangeabilityMonitor
from skimp.runtime.cascade.extract import answer_of, canonical, extractor, vote
from typer.testing import CliRunner


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("number", "so she makes $18.0 a day", "18"),
        ("number", "from 1,234.50 to -7e2", "-700"),
        ("number", "no digits", None),
        ("number", "1e999", None),
        ("choice", "Therefore the answer is (C).", "C"),
        ("choice", "A\n", "A"),
        ("choice", "Answer: **b", "B"),
        ("choice", "a bad day", None),
        ("boxed", r"thus \boxed{\frac{1}{2}} or \boxed{ 42.0 }", "42"),
        ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{never closed", None),
        ("code", "text\n```python\nx = 1  # one\n\ny=2\n```", "x = 1\ny=2"),
        ("code", "no code", None),
        ("json:a.b", 'first {"a": 1} then {"a": {"b": [1, 2]}}', "[1, 2]"),
        ("json:a", "{broken {", None),
        (r"regex:id-(\d+)", "id-1 and id-22", "22"),
        (r"regex:\w+!", "yes! no!", "no!"),
    ],
)
def test_extractors(name, text, answer):
    assert extractor(name)(text) == answer


def test_votes():
    assert vote(["a", "b", "a", None]) == ("a", 0.5)
    assert vote(["b", "a"]) == ("b", 0.5)  # the first of equals
    assert vote([None, None]) == (None, 0.0)
    assert canonical("18.0") == canonical("$18") == canonical("1.8e1") == "18"
    assert canonical("-0.0") == "0"
    for bad in ("nothing", "json:", "regex:(", "regex:"):
        with pytest.raises(CalibrationError):
            extractor(bad)
    call = lambda text, i: {"tool_calls": [{"id": i, "function": {"name": "f", "arguments": text}}]}  # noqa: E731
    number = extractor("number")
    assert answer_of(call('{"a": 1, "b": 2}', "x"), number) == answer_of(
        call('{"b":2,"a":1}', "y"), number
    )
    assert answer_of({"content": [{"type": "text", "text": "it is 4"}]}, number) == "4"
    assert answer_of({"content": None}, number) is None


def test_a_deep_json_answer_does_not_break_the_extractor():
    assert extractor("json:a")("{" * 3000 + '"a"') is None


@pytest.mark.parametrize("kind", ["[]", "{}"])
def test_json_of_a_stranger_is_as_deep_as_is_allowed_and_no_deeper(kind):
    fits = {"[]": "[" * 100 + "]" * 100, "{}": '{"a":' * 99 + "{}" + "}" * 99}[kind]
    wider = f"[{fits}, 1]" if kind == "[]" else f'{{"b": {fits}}}'
    assert wire.loads(fits) is not None
    for text in (wider, wider.encode(), kind[0] * 100_000, kind * 5 + "]" * 200, '"' + "[" * 200):
        with pytest.raises(ValueError, match=r"deep|Extra data|Unterminated"):
            wire.loads(text)
    for open_string in ('"' + '\\"[' * 500_000, '"' + '\\"[' * 500_000 + "\\"):
        with pytest.raises(ValueError, match="Unterminated"):  # in time that grows with its length
            wire.loads(open_string)
    beside = "[" + ", ".join([f'{{"a\\"[": "{"[" * 300}"}}'] * 300) + "]"
    assert len(wire.loads(beside)) == 300  # brackets in text count for nothing
    assert wire.loads(b'\xef\xbb\xbf["\\ud83d"]') == ["\ud83d"]


def test_a_value_in_a_text_is_as_deep_as_is_allowed_and_no_deeper():
    fits = '{"a":' * 99 + "{}" + "}" * 99
    for after in ("", " so [[A]]", "]" * 200, "[" * 200, ' "' + "[" * 200):
        assert wire.value_at(f"so {fits}{after}", 3) == (json.loads(fits), 3 + len(fits))
    wide = "[" + ", ".join(['{"a\\"[": "]"}', "[]"] * 300) + "]"
    assert wire.value_at(wide + "[" * 9, 0) == (json.loads(wide), len(wide))
    for deep in (f'{{"b": {fits}}}', '{"a":' * 100_000, "[" * 101 + "]" * 101):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            wire.value_at(deep, 0)
    assert extractor("json:b")(f'{{"b": {fits}}}') is None
    assert extractor("json:a")(fits) == json.dumps(json.loads(fits)["a"])


@given(st.recursive(st.none() | st.text() | st.floats(allow_nan=False), st.lists, max_leaves=300))
def test_json_of_a_stranger_is_what_python_reads(value):
    text = json.dumps(value)
    assert wire.loads(text) == wire.loads(text.encode()) == json.loads(text)


def test_exceedance_alarms_seldom_when_the_promise_holds_and_soon_when_not():
    rng = np.random.default_rng(0)
    false = sum(_alarm(rng.random(1500) < 0.1) is not None for _ in range(200))
    assert false <= 200 * 0.05 + 2 * math.sqrt(200 * 0.05 * 0.95)
    late = [_alarm(np.r_[rng.random(1000) < 0.05, rng.random(400) < 0.4]) for _ in range(40)]
    assert all(at is not None and at > 1000 for at in late)
    assert np.median(late) < 1000 + 100  # good service before did not use up the evidence


def _alarm(over):
    monitor = ExceedanceMonitor(1.0, 0.1, 0.05)
    for x in over:
        monitor.add(2.0 if x else 0.5)
    return monitor.alarmed_at


def test_exchangeability_alarms_when_costs_change():
    rng = np.random.default_rng(0)
    false = found = 0
    for seed in range(60):
        reference = rng.gamma(2, 1, 200)
        same = ExchangeabilityMonitor(reference, 0.05, seed)
        other = ExchangeabilityMonitor(reference, 0.05, seed)
        for a, b in zip(rng.gamma(2, 1, 400), rng.gamma(2, 1.6, 400), strict=True):
            same.add(a)
            other.add(b)
        false += same.alarmed_at is not None
        found += other.alarmed_at is not None
    assert false <= 60 * 0.05 + 2 * math.sqrt(60 * 0.05 * 0.95)
    assert found >= 57


# -- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def traces(tmp_path):
    """A small model that is right where it agrees, and a large one."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(300):
        hard = rng.random() < 0.3
        votes = [str(rng.integers(9)) if hard else "7" for _ in range(5)]
        dear = 1e-3 * rng.uniform(0.8, 1.2)
        members = {
            "small": {
                "samples": [{"text": f"{i}.{k}? {v}", "cost": 1e-5} for k, v in enumerate(votes)]
            },
            "large": {"samples": [{"text": "7", "cost": dear}]},
        }
        lines.append(json.dumps({"id": i, "members": members}))
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines))
    return path


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_calibrate_from_the_command_line(traces, tmp_path):
    out = tmp_path / "p.json"
    done = run(
        "cascade",
        "calibrate",
        "--traces",
        traces,
        "--budget",
        0.0012,
        "--mode",
        "strict",
        "-o",
        out,
    )
    assert done.exit_code == 0, done.output
    assert "held out" in done.output
    record = json.loads(out.read_text())
    assert [m["samples"] for m in record["members"]] == [5, 1]  # as many as the traces have
    assert record["evidence"]["regret"] <= 0.05
    assert record["held_out"]["mean_cost"] < record["held_out"]["mean_cost_of_strongest"]
    first = out.read_bytes()
    run(
        "cascade",
        "calibrate",
        "--traces",
        traces,
        "--budget",
        0.0012,
        "--mode",
        "strict",
        "-o",
        out,
    )
    assert out.read_bytes() == first
    assert run("cascade", "show", out).exit_code == 0
    out.write_bytes(first.replace(b'"alpha": 0.1', b'"alpha": 0.2'))
    assert "changed after calibration" in str(run("cascade", "show", out).exception)


def test_infeasible_is_an_outcome(traces, tmp_path):
    out = tmp_path / "p.json"
    done = run("cascade", "calibrate", "--traces", traces, "--budget", 1e-6, "-o", out, "--json")
    assert done.exit_code == 3
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == "infeasible"
    assert told["least_budget"] == pytest.approx(5e-5)
    assert not out.exists()
    again = run(
        "cascade", "calibrate", "--traces", traces, "--budget", told["least_budget"], "-o", out
    )
    assert again.exit_code == 0


def test_collect_goes_on_where_it_was(provider, tmp_path):
    stub = provider()
    member = {"url": stub.url, "price": {"input": 1, "output": 2}}
    config = {"members": {"small": {**member, "samples": 3}, "large": member}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    prompts = tmp_path / "q.jsonl"
    asked = [{"id": f"q{i}", "prompt": f"n={i} small=ok:{i}|{i + 1} large=500"} for i in range(4)]
    prompts.write_text("\n".join(map(json.dumps, asked)))
    out = tmp_path / "t.jsonl"
    args = ("cascade", "collect", tmp_path / "c.yaml", "--prompts", prompts, "-o", out)
    assert run(*args, "--limit", 2).exit_code == 0
    out.write_text(out.read_text() + '{"id": "q2", "mem')  # killed in the middle of a line
    assert "Asked 2 prompts" in run(*args).output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(r["id"] for r in rows) == ["q0", "q1", "q2", "q3"]
    assert len(rows[0]["members"]["small"]["samples"]) == 3
    assert rows[0]["members"]["small"]["samples"][0]["cost"] == pytest.approx((11 + 14) * 1e-6)
    assert rows[0]["members"]["large"]["samples"] == [
        {"error": "500", "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0}
    ]


def test_collecting_counts_what_a_failure_may_have_cost(provider, tmp_path):
    """As the server counts it: a member that times out must not be taken for a cheap one."""
    stub = provider()
    member = {"url": stub.url, "price": {"input": 1, "output": 2}, "timeout_s": 0.5}
    config = {"members": {"silent": member, "mute": member, "down": member}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    prompts = tmp_path / "q.jsonl"
    text = "silent=stall mute=usage:null down=drop"
    prompts.write_text(json.dumps({"id": "q", "prompt": text}))
    out = tmp_path / "t.jsonl"
    done = run("cascade", "collect", tmp_path / "c.yaml", "--prompts", prompts, "-o", out)
    assert done.exit_code == 0, done.output
    members = json.loads(out.read_text())["members"]
    cost = {n: m["samples"][0]["cost"] for n, m in members.items()}
    assert cost["silent"] > 1e-5
    assert cost["mute"] > cost["silent"]  # and what it said
    assert cost["down"] == 0  # it never answered, and nobody charges for that


def test_serve_refuses_what_would_be_unsafe(tmp_path):
    member = {"url": "http://127.0.0.1:9/v1", "price": {"input": 0, "output": 0}}
    (tmp_path / "c.yaml").write_text(json.dumps({"members": {"a": member}}))
    done = run("serve", tmp_path / "c.yaml", "--host", "0.0.0.0")
    assert "anyone could spend your money" in str(done.exception)
    assert "give a configuration file, or --demo" in str(run("serve").exception)
