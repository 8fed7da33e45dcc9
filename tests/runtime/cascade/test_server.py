"""The server as clients see it: the openai package and curl, against providers on loopback."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys

import aiohttp
import httpx
import openai
import pytest
from skimp.ir.errors import SkimpError
from skimp.runtime.cascade.config import ConfigError, load_config, parse_config

FREE = {"input": 0, "output": 0}
SMALL, LARGE = {"input": 0.1, "output": 0.2}, {"input": 3.0, "output": 15.0}


def two(provider, write_policy, thresholds=(0.6,), **more):
    """A cascade of a small and a large member at two providers."""
    a, b = provider(), provider()
    name = write_policy([("small", 3), ("large", 1)], list(thresholds))
    config = {
        "members": {
            "small": {"url": a.url, "price": SMALL, "retries": 0},
            "large": {"url": b.url, "price": LARGE, "retries": 0},
        },
        "policies": {"cascade": name, "cheap": "single:small"},
        **more,
    }
    return config, a, b


def client(server, key="none"):
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0)


def ask(server, text="hello", model="skimp", **more):
    return client(server).chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], **more
    )


def test_agreement_stays_cheap_and_disagreement_climbs(provider, write_policy, serve):
    config, a, b = two(provider, write_policy)
    server = serve(config)
    reply = ask(server, "small=ok:7")
    assert reply.choices[0].message.content == "7"
    assert (a.calls["small"], b.calls["large"]) == (3, 0)
    told = reply.model_extra["skimp"]
    assert [h["member"] for h in told["route"]] == ["small"]
    assert told["route"][0]["confidence"] == 1.0
    assert told["cost"] == pytest.approx((33 * 0.1 + 21 * 0.2) * 1e-6, abs=1e-15)
    reply = ask(server, "small=ok:1|2|3 large=ok:9")
    assert reply.choices[0].message.content == "9"
    assert [h["member"] for h in reply.model_extra["skimp"]["route"]] == ["small", "large"]
    assert b.calls["large"] == 1
    assert all(body["temperature"] == 0.7 for body in a.bodies)  # votes are sampled
    rows = server.rows("requests")
    assert {r["route"] for r in rows} == {"small:1.00", "small:0.33>large"}
    assert all(r["status"] == "ok" for r in rows)
    assert len(server.rows("attempts")) == 7
    assert server.rows("reservations") == []


def test_a_skipped_member_is_not_called(provider, write_policy, serve):
    config, a, b = two(provider, write_policy, ["skip"])
    server = serve(config)
    assert ask(server, "large=ok:9").choices[0].message.content == "9"
    assert (a.calls["small"], b.calls["large"]) == (0, 1)
    assert sum(r["cost"] for r in server.rows("attempts")) == pytest.approx(
        (11 * 3.0 + 7 * 15.0) * 1e-6
    )


def test_one_call_with_n_where_the_member_can(provider, write_policy, serve):
    config, a, _ = two(provider, write_policy)
    config["members"]["small"]["batches"] = True
    server = serve(config)
    reply = ask(server, "small=ok:4|4|5")
    assert reply.choices[0].message.content == "4"
    assert len(reply.choices) == 1
    assert a.calls["small"] == 1
    assert a.bodies[0]["n"] == 3
    assert reply.model_extra["skimp"]["route"][0]["confidence"] == pytest.approx(2 / 3)


def test_streams_only_the_final_member(provider, write_policy, serve):
    config, a, b = two(provider, write_policy)
    server = serve(config)
    chunks = list(ask(server, "small=ok:1|2|3 large=ok:9", stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == "9 w1 w2 w3 w4 "
    assert all(c.choices for c in chunks)  # usage was not asked for
    assert b.bodies[0]["stream_options"]["include_usage"] is True
    assert "stream" not in a.bodies[0]
    options = {"include_usage": True}
    chunks = list(ask(server, "small=ok:1|2|3 large=ok:9", stream=True, stream_options=options))
    assert chunks[-1].usage.completion_tokens == 7
    chunks = list(ask(server, "small=ok:5", stream=True, stream_options=options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "5"
    assert chunks[-1].usage.completion_tokens == 7
    spent = sum(r["cost"] for r in server.rows("attempts"))
    billed = a.billed["small"], b.billed["large"]
    expect = sum(
        (p * price["input"] + c * price["output"]) * 1e-6
        for (p, c), price in zip(billed, (SMALL, LARGE), strict=True)
    )
    assert spent == pytest.approx(expect, abs=1e-12)


def test_tools_images_and_unknown_fields_pass_untouched(provider, write_policy, serve):
    config, a, _ = two(provider, write_policy)
    server = serve(config)
    schema = {
        "type": "object",
        "properties": {
            "x": {
                "type": "array",
                "items": {"type": "object", "properties": {"y": {"enum": [1, None, True]}}},
            }
        },
        "required": ["x"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    content = [{"type": "text", "text": "small=ok:7"}, picture]
    reply = client(server).chat.completions.create(
        model="skimp",
        messages=[{"role": "user", "content": content}],
        tools=tools,
        extra_body={"made_up": {"deep": [1, {"a": None}]}},
    )
    call = reply.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"x": "7"}
    assert reply.model_extra["skimp"]["route"][0]["confidence"] == 1.0  # tool calls can agree
    sent = a.bodies[0]
    assert sent["tools"] == tools
    assert sent["messages"][0]["content"] == content
    assert sent["made_up"] == {"deep": [1, {"a": None}]}
    chunks = list(
        client(server).chat.completions.create(
            model="skimp", messages=[{"role": "user", "content": content}], tools=tools, stream=True
        )
    )
    assert chunks[0].choices[0].delta.tool_calls[0].function.name == "f"


def test_plain_completions_and_models(provider, write_policy, serve):
    config, _, _ = two(provider, write_policy)
    server = serve(config)
    reply = client(server).completions.create(model="skimp", prompt="small=ok:7")
    assert reply.choices[0].text == "7"
    text = "".join(
        c.choices[0].text
        for c in client(server).completions.create(model="large", prompt="large=ok:9", stream=True)
    )
    assert text.startswith("9 w1")
    names = [m.id for m in client(server).models.list()]
    assert names == ["skimp", "cascade", "cheap", "small", "large"]
    assert client(server).models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        ask(server, model="gpt-9")
    assert ask(server, "large=ok:3", model="large").choices[0].message.content == "3"
    assert len(ask(server, "large=ok:3", n=2).choices) == 2  # several answers are no vote


@pytest.mark.parametrize("fault", ["429", "500", "stall", "malformed", "drop"])
@pytest.mark.parametrize("stream", [False, True])
def test_fallback_records_every_attempt(provider, write_policy, serve, fault, stream):
    one, other = provider(), provider()
    config = {
        "members": {
            "first": {"url": one.url, "price": LARGE, "timeout_s": 0.4, "fallback": ["second"]},
            "second": {"url": other.url, "price": SMALL},
        },
        "policies": {"only": "single:first"},
    }
    server = serve(config)
    reply = ask(server, f"first={fault} second=ok:8", stream=stream)
    if stream:
        assert "".join(c.choices[0].delta.content or "" for c in reply) == "8 w1 w2 w3 w4 "
    else:
        assert reply.choices[0].message.content == "8"
    kind = {"stall": "timeout", "drop": "connection"}.get(fault, fault)
    kind = "broken" if stream and fault == "malformed" else kind  # JSON where events should be
    tried = [(r["member"], r["status"]) for r in server.rows("attempts")]
    assert tried.count(("second", "ok")) == 1
    again = 1 if fault == "malformed" else 2  # a malformed reply is not asked for twice
    assert [t for t in tried if t[0] == "first"] == [("first", kind)] * again
    (row,) = server.rows("requests")
    assert row["cost"] == pytest.approx((11 * 0.1 + 7 * 0.2) * 1e-6, abs=1e-15)
    assert (row["estimate"] > 0) == (fault in ("stall", "malformed"))  # those may have been billed


def test_a_refusal_of_the_request_is_passed_on(provider, write_policy, serve):
    config, _, _ = two(provider, write_policy)
    server = serve(config)
    with pytest.raises(openai.BadRequestError, match="told to say 400"):
        ask(server, "small=400 large=400")
    assert ask(server, "small=400 large=ok:6").choices[0].message.content == "6"
    with pytest.raises(openai.RateLimitError):
        ask(server, "small=429 large=429")
    with pytest.raises(openai.InternalServerError):
        ask(server, "small=500 large=500")


def test_the_best_vote_is_served_when_nobody_stronger_answers(provider, write_policy, serve):
    config, _, _ = two(provider, write_policy)
    server = serve(config)
    for stream in (False, True):
        reply = ask(server, "small=ok:1|2|3 large=500", stream=stream)
        if stream:
            assert next(iter(reply)).choices[0].delta.content in "123"
        else:
            assert reply.choices[0].message.content in "123"
    assert {r["status"] for r in server.rows("requests")} == {"degraded"}


def test_errors_have_openai_s_form(provider, write_policy, serve):
    config, _, _ = two(provider, write_policy, server={"max_body_mb": 0.01})
    server = serve(config)
    post = lambda **k: httpx.post(f"{server.url}/chat/completions", **k)  # noqa: E731
    for kwargs, status in (
        ({"content": b"{"}, 400),
        ({"content": b"[" * 5000}, 400),
        ({"json": [1]}, 400),
        ({"json": {"model": "skimp"}}, 400),
        ({"json": {"model": "skimp", "messages": []}}, 400),
        ({"json": {"model": "skimp", "messages": [{"role": "user", "content": "x" * 20000}]}}, 413),
        ({"json": {"model": ["x"], "messages": [{}]}}, 404),
        ({"content": (b"x" * 1000 for _ in range(50))}, 413),
    ):
        reply = post(**kwargs)
        assert reply.status_code == status, reply.text
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    foreign = post(
        json={"model": "skimp", "messages": [{"role": "user", "content": "x"}]},
        headers={"origin": "https://elsewhere.example"},
    )
    assert foreign.status_code == 403


def test_callers_need_their_key_and_stay_in_their_budget(
    provider, write_policy, serve, monkeypatch
):
    monkeypatch.setenv("ALICE", "key-of-alice")
    monkeypatch.setenv("BOB", "key-of-bob")
    monkeypatch.setenv("UPSTREAM", "secret-upstream")
    config, _, b = two(
        provider,
        write_policy,
        callers={
            "alice": {"key": "ALICE", "budget": {"usd": 0.02, "per": "day"}},
            "bob": {"key": "BOB", "admin": True},
        },
    )
    config["members"]["large"] |= {"key": "UPSTREAM", "max_tokens": 500}
    server = serve(config)
    with pytest.raises(openai.AuthenticationError):
        ask(server)
    assert httpx.get(f"{server.root}/metrics").status_code == 401
    assert httpx.get(f"{server.root}/healthz").status_code == 200
    for key, status in (("key-of-alice", 403), ("key-of-bob", 200), ("none", 401)):
        reply = httpx.put(
            f"{server.root}/api/policy",
            json={"name": "cascade"},
            headers={"authorization": f"Bearer {key}"},
        )
        assert reply.status_code == status
    bob, alice = client(server, "key-of-bob"), client(server, "key-of-alice")
    many = dict(model="large", messages=[{"role": "user", "content": "large=ok:1"}])
    assert alice.chat.completions.create(**many).choices[0].message.content == "1"
    assert b.keys == ["Bearer secret-upstream"]
    assert b.bodies[0]["max_tokens"] == 500  # so that the reservation is an upper bound
    with pytest.raises(openai.RateLimitError, match="budget 'caller:alice"):
        alice.chat.completions.create(**many, max_completion_tokens=2000)
    bob.chat.completions.create(**many, max_completion_tokens=2000)
    (book,) = [r for r in server.rows("budgets") if r["name"].startswith("caller:alice@")]
    assert book["reserved"] == pytest.approx(0, abs=1e-15)
    assert book["spent"] == pytest.approx((11 * 3 + 7 * 15) * 1e-6)
    dump = " ".join(str(server.rows(t)) for t in ("requests", "attempts", "budgets"))
    assert "secret" not in dump
    assert "key-of" not in dump


def test_a_caller_who_hangs_up_is_recorded(provider, write_policy, serve):
    config, _, b = two(provider, write_policy, ["skip"])
    server = serve(config)

    async def hang_up(stream):
        body = {"model": "skimp", "messages": [{"role": "user", "content": "large=halt:3"}]}
        if not stream:
            body["messages"][0]["content"] = "large=stall"
        async with aiohttp.ClientSession() as session:
            request = session.post(f"{server.url}/chat/completions", json=body | {"stream": stream})
            if not stream:
                with pytest.raises(asyncio.TimeoutError):
                    async with asyncio.timeout(0.5), request:
                        pass
                return
            async with request as response:
                seen = b""
                while seen.count(b"data:") < 3:
                    seen += await response.content.readany()

    asyncio.run(hang_up(True))
    server.wait(lambda: len(server.rows("requests")) == 1)
    (attempt,) = server.rows("attempts")
    assert attempt["status"] == "cancelled"
    assert attempt["completion_tokens"] == 3
    assert attempt["reported"] in (False, 0)
    assert attempt["estimate"] == pytest.approx((attempt["prompt_tokens"] * 3.0 + 3 * 15.0) * 1e-6)
    assert server.rows("requests")[0]["status"] == "disconnected"
    server.wait(lambda: b.under_way == 0)  # the provider was told to stop
    asyncio.run(hang_up(False))
    server.wait(lambda: len(server.rows("requests")) == 2)
    assert {r["status"] for r in server.rows("requests")} == {"disconnected"}
    assert server.rows("reservations") == []


def test_a_stream_that_breaks_ends_in_an_error(provider, write_policy, serve):
    config, _, _ = two(provider, write_policy, ["skip"])
    server = serve(config)
    with pytest.raises(openai.APIError, match=r"ended before|connection failed"):
        list(ask(server, "large=break:2", stream=True))
    (row,) = server.rows("requests")
    assert row["status"] == "broken"
    assert row["estimate"] > 0
    assert server.rows("attempts")[0]["completion_tokens"] == 2


def test_the_policy_changes_without_a_restart(provider, write_policy, serve):
    config, _, b = two(provider, write_policy)
    server = serve(config)
    ask(server, "small=ok:1|2|3 large=ok:9")
    assert httpx.put(f"{server.root}/api/policy", json={"name": "cheap"}).json() == {
        "active": "cheap"
    }
    assert ask(server, "small=ok:5").model_extra["skimp"]["policy"] == "small"
    assert b.calls["large"] == 1
    assert httpx.put(f"{server.root}/api/policy", json={"name": "none"}).status_code == 404


def test_metrics_and_health(provider, write_policy, serve):
    config, _, _ = two(provider, write_policy)
    server = serve(config)
    ask(server, "small=ok:1|2|3 large=ok:9")
    text = httpx.get(f"{server.root}/metrics").text
    assert 'skimp_requests_total{policy="cascade",status="ok"} 1.0' in text
    assert 'skimp_attempts_total{member="small",status="ok"} 3.0' in text
    assert 'skimp_tokens_total{kind="completion",member="large"} 7.0' in text
    assert 'skimp_exceedance{policy="cascade"} 0.0' in text
    assert httpx.get(f"{server.root}/healthz").json()["status"] == "ok"


def test_drift_raises_an_alarm(provider, write_policy, serve, caplog):
    """Every request costs more than the budget that was calibrated."""
    config, _, _ = two(provider, write_policy)
    config["policies"]["cascade"] = write_policy(
        [("small", 3), ("large", 1)], [0.6], budget=1e-9, calibration_costs=[1e-10] * 50
    )
    server = serve(config)
    caplog.set_level("WARNING", logger="skimp.serve")
    for _ in range(12):
        ask(server, "small=ok:7")
    assert any("more often than" in r.message for r in caplog.records)
    told = httpx.get(f"{server.root}/api/summary").json()["policies"][0]["drift"]
    assert any("more often than" in a for a in told["alarms"])
    assert "skimp_drift_alarms_total" in httpx.get(f"{server.root}/metrics").text


def test_a_request_has_a_time_limit(provider, write_policy, serve):
    config, _, b = two(provider, write_policy, ["skip"], server={"timeout_s": 0.5})
    server = serve(config)
    with pytest.raises(openai.InternalServerError, match=r"no answer within 0\.5 s") as error:
        ask(server, "large=stall")
    assert error.value.status_code == 504
    stream = ask(server, "large=halt:2", stream=True)
    with pytest.raises(openai.APIError, match="took too long"):
        list(stream)
    server.wait(lambda: b.under_way == 0)  # the provider was told to stop
    attempts = server.rows("attempts")
    assert [a["status"] for a in attempts] == ["cancelled", "timeout"]
    assert all(a["estimate"] > 0 for a in attempts)
    assert [r["status"] for r in server.rows("requests")] == ["failed", "broken"]
    assert server.rows("reservations") == []


def test_a_crowd_is_turned_away(provider, write_policy, serve):
    config, _, _ = two(provider, write_policy, server={"max_in_flight": 2})
    server = serve(config)

    async def work():
        messages = [{"role": "user", "content": "large=slow:0.5"}]
        body = {"model": "large", "messages": messages, "stream": True}

        async def one(session):
            async with session.post(f"{server.url}/chat/completions", json=body) as response:
                await response.read()
                return response.status, response.headers.get("retry-after")

        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(one(session) for _ in range(5)))

    assert sorted(asyncio.run(work())) == [(200, None)] * 2 + [(503, "1")] * 3
    assert ask(server, "large=ok:1", model="large").choices[0].message.content == "1"


def test_nothing_is_served_that_is_not_recorded(provider, write_policy, serve):
    config, _, _ = two(provider, write_policy)
    server = serve(config)
    ask(server, "small=ok:7")
    with server.gateway.ledger.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE requests")
    with pytest.raises(openai.InternalServerError, match="the ledger cannot be written"):
        ask(server, "small=ok:7")
    with server.gateway.ledger.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE reservations")
    assert httpx.get(f"{server.root}/healthz").status_code == 503


def test_the_server_on_postgresql(provider, write_policy, serve, postgres):
    config, a, b = two(provider, write_policy, ledger=postgres, budget={"usd": 1, "per": "month"})
    server = serve(config)
    ask(server, "small=ok:1|2|3 large=ok:9")
    list(ask(server, "small=ok:1|2|3 large=ok:9", stream=True))
    ask(server, "small=500 large=ok:9")
    rows = server.rows("requests")
    assert sorted(r["route"] for r in rows) == ["small!>large", *["small:0.33>large"] * 2]
    spent = sum(
        (p * price["input"] + c * price["output"]) * 1e-6
        for (p, c), price in ((a.billed["small"], SMALL), (b.billed["large"], LARGE))
    )
    assert sum(r["cost"] for r in rows) == pytest.approx(spent, abs=1e-12)
    assert server.rows("reservations") == []
    told = httpx.get(f"{server.root}/api/summary").json()
    assert told["requests"] == 3
    assert told["budgets"][0]["reserved"] == pytest.approx(0, abs=1e-15)
    assert httpx.get(f"{server.root}/healthz").status_code == 200


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_curl(provider, write_policy, serve):
    config, a, _ = two(provider, write_policy)
    server = serve(config)

    def curl(*args):
        found = subprocess.run(
            ["curl", "-sS", "-i", *args], capture_output=True, text=True, check=True
        )
        return found.stdout

    body = json.dumps({"model": "skimp", "messages": [{"role": "user", "content": "small=ok:7"}]})
    header = ("-H", "content-type: application/json")
    text = curl(f"{server.url}/chat/completions", *header, "-d", body)
    assert "x-skimp-route: small:1.00" in text
    assert '"content":"7"' in text
    streamed = curl(
        "-N", f"{server.url}/chat/completions", *header, "-d", body[:-1] + ', "stream": true}'
    )
    assert streamed.rstrip().endswith("data: [DONE]")
    told = json.loads(re.search(r"^: skimp (.*)$", streamed, re.MULTILINE)[1])
    assert told["route"][0]["prompt_tokens"] == 33
    assert "text/event-stream" in streamed
    parameters = {"type": "object", "properties": {"x": {"anyOf": [{"type": "null"}, {}]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    called = curl(
        f"{server.url}/chat/completions",
        *header,
        "-d",
        json.dumps({**json.loads(body), "tools": tools}),
    )
    answer = json.loads(called.split("\r\n\r\n" if "\r\n" in called else "\n\n", 1)[1])
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"
    assert a.bodies[-1]["tools"] == tools
    assert (
        "404"
        in curl(
            f"{server.url}/chat/completions", *header, "-d", body.replace("skimp", "x", 1)
        ).splitlines()[0]
    )


def test_every_status_of_the_log_line_and_no_prompt(provider, write_policy, serve, caplog):
    config, _, _ = two(provider, write_policy)
    server = serve(config)
    caplog.set_level("INFO", logger="skimp.serve")
    ask(server, "small=ok:7 confidential")
    line = json.loads(next(r.message for r in caplog.records if '"request"' in r.message))
    assert line["skimp-route"] == "small:1.00"
    assert line["status"] == 200
    assert not any("confidential" in r.message for r in caplog.records)


def test_importing_the_server_needs_no_key_and_no_model(tmp_path):
    """Nor much time: less than PyTorch, which comes with the package, takes by itself."""
    code = (
        "import sys, time; a = time.process_time();"
        "import torch; b = time.process_time();"
        "import skimp; c = time.process_time();"
        "import skimp.runtime.cascade.server, skimp.runtime.cascade.build; d = time.process_time();"
        "heavy = {'transformers', 'openai', 'litellm', 'sklearn', 'mapie', 'matplotlib'};"
        "bad = heavy & set(sys.modules);"
        "print(b - a, c - b, d - c);"
        "sys.exit(str(bad) if bad else 0 if d - c < b - a else 'slower than torch')"
    )
    clean = {k: v for k, v in os.environ.items() if "KEY" not in k}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_configurations_that_cannot_work(tmp_path, monkeypatch):
    good = {"members": {"a": {"url": "http://x/v1", "price": FREE}}}
    parse_config(good)
    for change, match in (
        ({"members": {}}, "no members"),
        ({"members": {"a": {"price": FREE}}}, "either `url` or `local`"),
        ({"members": {"a": {"url": "ftp://x", "price": FREE}}}, "neither http"),
        ({"members": {"a": {"url": "http://x"}}}, "price"),
        ({"members": {"skimp": {"url": "http://x", "price": FREE}}}, "cannot be called"),
        ({"policies": {"p": "single:b"}}, "no member 'b'"),
        ({"active": "p"}, "no policy 'p'"),
        ({"sevrer": {}}, "Extra inputs"),
    ):
        with pytest.raises(ConfigError, match=match):
            parse_config({**good, **change})
    path = tmp_path / "c.yaml"
    path.write_text("members: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    from skimp.runtime.cascade.build import build_gateway

    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        build_gateway(
            parse_config({"members": {"a": {**good["members"]["a"], "key": "NO_SUCH_KEY"}}})
        )
    two_members = {"members": dict.fromkeys("ab", good["members"]["a"])}
    with pytest.raises(ConfigError, match="no policy says"):
        build_gateway(parse_config(two_members))
    with pytest.raises(SkimpError, match="cannot be opened"):
        build_gateway(parse_config({**good, "ledger": f"sqlite:///{tmp_path}/no/such/folder/x.db"}))
