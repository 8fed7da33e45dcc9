"""What callers and members get wrong, by mistake or not, and what it must not do."""

import asyncio
import json
import logging
import socket
import time

import httpx
import openai
import pytest
from skimp.runtime.cascade.config import ConfigError, parse_config
from skimp.runtime.cascade.extract import answer_of, extractor
from skimp.runtime.cascade.limits import Limited
from skimp.runtime.cascade.member import Chunk
from skimp.runtime.cascade.price import (
    IMAGE_TOKENS,
    answers_wanted,
    most_prompt_tokens,
    samples_billed,
    token_limit,
)

SMALL, LARGE = {"input": 0.1, "output": 0.2}, {"input": 3.0, "output": 15.0}


@pytest.fixture
def two(provider, write_policy, serve):
    """A function that serves a cascade of a small and a large member."""

    def start(thresholds=(0.6,), small=None, large=None, **more):
        a, b = provider(), provider()
        members = {
            "small": {"url": a.url, "price": SMALL, "retries": 0, **(small or {})},
            "large": {"url": b.url, "price": LARGE, "retries": 0, **(large or {})},
        }
        name = write_policy([("small", 3), ("large", 1)], list(thresholds))
        server = serve({"members": members, "policies": {"cascade": name}, **more})
        server.a, server.b = a, b
        return server

    return start


def post(server, text="hello", path="chat/completions", **more):
    body = {"model": "skimp", "messages": [{"role": "user", "content": text}], **more}
    return httpx.post(f"{server.url}/{path}", json=body, timeout=30)


def raw_request(server, body, **headers):
    head = {"host": "x", "content-type": "application/json", "content-length": len(body), **headers}
    lines = "".join(f"{k}: {v}\r\n" for k, v in head.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + body


def connect(server):
    host, port = server.root.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def send_on(s):
    for _ in range(2000):
        s.sendall(b"x" * 4096)
        time.sleep(0.001)


# -- requests -------------------------------------------------------------------------------------


def test_fields_that_money_depends_on_are_checked(two):
    server = two(budget={"usd": 1})
    huge = 10**400
    for field, value in (
        ("n", "5"),
        ("n", 0),
        ("n", True),
        ("n", 2.5),
        ("n", 129),
        ("n", huge),
        ("best_of", huge),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", "9"),
        ("max_tokens", huge),
        ("max_completion_tokens", -1),
        ("stream", "false"),
        ("stream", 1),
        ("stream_options", "usage"),
    ):
        reply = post(server, **{field: value})
        assert reply.status_code == 400, (field, value)
        assert f"`{field}`" in reply.json()["error"]["message"]
    message = b'{"model": "skimp", "messages": [{"role": "user", "content": "x"}], "more": %s}'
    nested = b"[" * 150 + b"]" * 150
    for value, status in ((b"NaN", 400), (b"-Infinity", 400), (nested, 400), (b"[[[1]]]", 200)):
        reply = httpx.post(f"{server.url}/chat/completions", content=message % value, timeout=30)
        assert reply.status_code == status, value[:9]
    plain = {"model": "large", "prompt": "large=ok:1", "max_tokens": 0}
    assert httpx.post(f"{server.url}/completions", json=plain).status_code == 200
    assert server.b.bodies[-1]["max_tokens"] == 0
    assert post(server, n=2.0).status_code == 200
    assert repr(server.b.bodies[-1]["n"]) == "2"  # not 2.0, which members may read as they like
    assert server.a.calls["small"] == 3
    assert server.rows("reservations") == []


@pytest.mark.parametrize("stream", ["false", "true"])
def test_half_a_surrogate_pair_passes(two, stream):
    """Clients and models that cut a text in the middle of an emoji send it."""
    server = two(budget={"usd": 1})
    for model in ("large", "skimp"):
        text = "large=ok:\\ud83d small=ok:\\ud83d"
        body = '{"model": "%s", "stream": %s, "messages": [{"role": "user", "content": "%s"}]}'
        reply = httpx.post(f"{server.url}/chat/completions", content=body % (model, stream, text))
        assert reply.status_code == 200, reply.text
        assert "\\ud83d" in reply.text.lower()
    assert server.b.bodies[0]["messages"][0]["content"].startswith("large=ok:\ud83d")


def test_no_prompt_has_more_tokens_than_are_reserved():
    text = "data:" + "x" * 5000  # begins like a picture, and is none
    chat = lambda content: {"messages": [{"role": "user", "content": content}]}  # noqa: E731
    assert most_prompt_tokens(chat(text)) > 5000
    picture = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    assert most_prompt_tokens(chat([picture])) > IMAGE_TOKENS
    inline = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 90_000}}
    assert IMAGE_TOKENS < most_prompt_tokens(chat([inline])) < IMAGE_TOKENS + 500
    schema = {"type": "json_schema", "json_schema": {"description": "y" * 3000}}
    assert most_prompt_tokens({**chat("x"), "response_format": schema}) > 3000
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert most_prompt_tokens(chat(deep)) > 0
    assert token_limit({"max_tokens": 9000, "max_completion_tokens": 1}) == 9000
    assert token_limit({"max_tokens": None}) is None
    assert samples_billed({"n": 2, "best_of": 9, "prompt": ["a", "b"]}, 1) == 18
    assert samples_billed({"prompt": [5, 6, 7]}, 3) == 3  # one prompt, in tokens
    assert answers_wanted({"prompt": [[5], [6]], "n": 2}) == 4
    assert answers_wanted({"prompt": ["one"]}) == 1


def test_several_prompts_are_answered_each_and_reserved_for(two):
    server = two(budget={"usd": 0.05}, large={"max_tokens": 100})
    prompts = ["large=ok:1|2|3", "b", "c"]
    body = {"model": "skimp", "prompt": prompts}
    reply = httpx.post(f"{server.url}/completions", json=body).json()
    assert [c["text"] for c in reply["choices"]] == ["1", "2", "3"]
    assert server.a.calls["small"] == 0  # answers to different questions are no votes
    many = httpx.post(f"{server.url}/completions", json={**body, "prompt": ["large=ok:1"] * 40})
    assert many.status_code == 429  # 40 times 100 tokens at $15 a million are $0.06
    assert httpx.post(f"{server.url}/completions", json={**body, "best_of": 40}).status_code == 429


def test_a_body_that_never_ends_well(two, caplog):
    server = two()
    caplog.set_level(logging.INFO)
    with connect(server) as s:
        s.sendall(raw_request(server, b'{"model": "skimp", "me', **{"content-length": 500}))
        time.sleep(0.2)
    server.wait(lambda: any('"status": 499' in r.message for r in caplog.records))
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert post(server, "small=ok:7").status_code == 200


def test_heads_have_limits(two, monkeypatch):
    server = two()
    monkeypatch.setattr(Limited, "head_seconds", 0.5)

    def closed(s):
        try:
            return s.recv(1000) == b""
        except ConnectionError:
            return True

    with connect(server) as s:
        assert closed(s)  # nothing was asked
    with connect(server) as s:
        s.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-slow: ")
        assert closed(s)
    monkeypatch.setattr(Limited, "head_seconds", 30)
    with connect(server) as s:
        s.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-long: ")
        with pytest.raises(ConnectionError):
            send_on(s)
    with httpx.Client() as client:  # one connection, heads one after the other, a large body
        for _ in range(3):
            assert client.get(f"{server.root}/healthz").status_code == 200
            text = "small=ok:7 " + "x" * 300_000
            body = {"model": "small", "messages": [{"role": "user", "content": text}]}
            assert client.post(f"{server.url}/chat/completions", json=body).status_code == 200


def test_what_is_not_there_says_so_in_openai_s_form(two):
    server = two()
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="skimp", input="x")
    for reply in (
        httpx.get(f"{server.url}/nowhere"),
        httpx.get(f"{server.url}/chat/completions"),
        httpx.get(f"{server.root}/docs"),
        httpx.get(f"{server.root}/api/summary?hours=nan"),
        httpx.get(f"{server.root}/api/summary?hours=x"),
    ):
        assert reply.status_code in (400, 404, 405)
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


# -- members --------------------------------------------------------------------------------------


def test_votes_beyond_those_asked_for_do_not_count(two):
    server = two(small={"batches": True})
    told = post(server, "small=extra:4|4|5|9|9|9|9").json()
    assert told["choices"][0]["message"]["content"] == "4"
    assert told["skimp"]["route"][0]["confidence"] == pytest.approx(2 / 3)
    assert len(told["choices"]) == 1


@pytest.mark.parametrize(
    "usage", ["{}", "null", "[]", f'{{"prompt_tokens":{10**30}}}', '{"completion_tokens":-1}']
)
def test_usage_that_makes_no_sense_is_not_believed(two, usage):
    server = two(budget={"usd": 1})
    assert post(server, f"large=usage:{usage}", model="large").status_code == 200
    (attempt,) = server.rows("attempts")
    assert not attempt["reported"]
    assert attempt["cost"] == 0 < attempt["estimate"] < 1e-3
    assert server.rows("reservations") == []


def test_calls_of_tools_that_are_none_break_nothing(two):
    server = two()
    for calls in ('["f"]', '[{"function":"f"}]', '{"a":1}', '[{"function":{"arguments":7}}]'):
        assert post(server, f"small=calls:{calls} large=ok:1").status_code == 200, calls
    deep = {"tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}
    assert answer_of(deep, extractor("number"))


@pytest.mark.timeout(60)
def test_no_text_keeps_an_extractor_busy():
    """Models that go wrong repeat themselves; quadratic time would stop the whole server."""
    parts = ("\n", " ", "***\n", "(A", "answer" + " " * 99, "```\n", "{", '{"a":', "1,", "-", "1e")
    for part in parts:
        for name in ("number", "choice", "boxed", "code", "json:a"):
            extractor(name)(part * (60_000 // len(part)))
    assert extractor("choice")("so:\n\n  **C**  \n") == "C"
    assert extractor("choice")("The answer is:   (b)") == "B"


def test_a_redirect_is_no_answer(two):
    reply = post(two(), "large=302", model="large")
    assert reply.status_code == 502
    assert reply.json()["error"]["code"] == "malformed"


@pytest.mark.parametrize("wait", ["nan", "-5", "inf", "soon"])
def test_when_to_come_back_is_bounded(two, wait):
    server = two(large={"retries": 1})
    begun = time.monotonic()
    assert post(server, f"large=later:{wait}", model="large").status_code == 429
    assert time.monotonic() - begun < 15
    assert server.b.calls["large"] == 2


def test_names_of_any_script_go_into_headers(provider, serve):
    members = {"größe 小": {"url": provider().url, "price": SMALL, "model": "m"}}
    server = serve({"members": members, "policies": {"日": "single:größe 小"}})
    reply = post(server, "m=ok:1")
    assert reply.status_code == 200
    assert reply.headers["x-skimp-route"] == "gr%C3%B6%C3%9Fe %E5%B0%8F"
    assert server.rows("requests")[0]["served"] == "größe 小"


def test_a_long_way_fits_into_a_header(provider, serve):
    url = provider().url
    names = [f"{'m' * 150}{i}" for i in range(60)]
    members = {n: {"url": url, "price": SMALL, "model": "m", "retries": 0} for n in names}
    members[names[0]]["fallback"] = names[1:]
    reply = post(serve({"members": members, "policies": {"p": f"single:{names[0]}"}}), "m=500")
    assert reply.status_code == 502
    members["last"] = {"url": url, "price": SMALL, "model": "good"}
    members[names[0]]["fallback"] += ["last"]
    reply = post(serve({"members": members, "policies": {"p": f"single:{names[0]}"}}), "m=500")
    assert reply.status_code == 200
    assert len(reply.headers["x-skimp-route"]) <= 4000
    assert len(reply.json()["skimp"]["route"]) == 61  # the body has all of it


def test_who_served_is_who_answered(two):
    server = two(["skip"], large={"fallback": ["small"]})
    for stream in (False, True):
        assert post(server, "large=500 small=ok:3", stream=stream).status_code == 200
    assert [r["served"] for r in server.rows("requests")] == ["small", "small"]


# -- time and streams -----------------------------------------------------------------------------


def test_votes_are_served_when_time_is_up(two):
    server = two((0.9,), server={"timeout_s": 1.5})
    reply = post(server, "small=ok:1|2|2 large=stall")  # samples arrive in any order
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["message"]["content"] == "2"
    assert [r["status"] for r in server.rows("requests")] == ["degraded"]
    assert server.rows("reservations") == []


def test_a_caller_who_does_not_read_is_given_up(two):
    server = two(["skip"], server={"timeout_s": 1.0})
    body = {"model": "large", "stream": True}
    body["messages"] = [{"role": "user", "content": "large=flood:1"}]
    with connect(server) as s:
        s.sendall(raw_request(server, json.dumps(body).encode()))
        server.wait(lambda: len(server.rows("requests")) == 1, 20)
        server.wait(lambda: server.b.under_way == 0)
    (row,) = server.rows("requests")
    assert row["status"] in ("disconnected", "broken")
    assert row["estimate"] > 1000 * 15e-6  # many pieces of many tokens each
    assert server.rows("reservations") == []


def test_a_stream_that_cannot_be_recorded_ends_in_an_error(two, caplog):
    server = two()
    with server.gateway.ledger.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE requests")
    reply = post(server, "large=ok:3", model="large", stream=True)
    assert "[DONE]" not in reply.text
    assert json.loads(reply.text.rsplit("data: ", 1)[1])["error"]["code"] == "ledger"
    assert any('"event": "stream"' in r.message for r in caplog.records)


def test_the_log_says_what_a_stream_cost(two, caplog):
    server = two()
    caplog.set_level("INFO", logger="skimp.serve")
    post(server, "large=ok:3", model="large", stream=True)
    post(server, "large=break:2", model="large", stream=True)
    server.wait(lambda: sum('"request"' in r.message for r in caplog.records) == 2)
    lines = [json.loads(r.message) for r in caplog.records if '"request"' in r.message]
    assert [line["stream"] for line in lines] == ["ok", "broken"]
    assert float(lines[0]["skimp-cost"]) == pytest.approx((11 * 3 + 7 * 15) * 1e-6)


def test_a_mistake_of_the_server_s_is_told_without_the_prompt(two, caplog):
    server = two()

    async def broken(*_):
        raise ValueError("confidential")

    server.gateway.entries["large"].member.complete = broken
    reply = post(server, "confidential", model="large")
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal"
    assert any("ValueError at" in r.message for r in caplog.records)
    assert "confidential" not in caplog.text + reply.text
    assert [r["status"] for r in server.rows("requests")] == ["failed"]


def test_a_mistake_in_a_stream_is_no_caller_who_hung_up(two):
    server = two()

    async def broken(*_):
        yield Chunk.of({"choices": [{"index": 0, "delta": {"content": "confidential"}}]})
        raise ValueError("confidential")

    server.gateway.entries["large"].member.stream = broken
    reply = post(server, model="large", stream=True)
    assert json.loads(reply.text.rsplit("data: ", 1)[1])["error"]["code"] == "internal"
    server.wait(lambda: server.rows("requests"))
    assert [r["status"] for r in server.rows("requests")] == ["broken"]
    assert [a["status"] for a in server.rows("attempts")] == ["error"]


# -- configuration and budgets --------------------------------------------------------------------


def test_keys_and_names_are_checked(two, monkeypatch):
    monkeypatch.setenv("ONE", "the-key")
    monkeypatch.setenv("OTHER", "the-key")
    with pytest.raises(ConfigError, match="the same key as that of 'a'"):
        two(callers={"a": {"key": "ONE"}, "b": {"key": "OTHER"}})
    server = two(callers={"a": {"key": "ONE"}})
    for header, status in (("bearer the-key", 200), ("Basic the-key", 401), ("the-key", 401)):
        reply = httpx.get(f"{server.url}/models", headers={"authorization": header})
        assert reply.status_code == status
    good = {"url": "http://x/v1", "price": SMALL}
    for members, match in (
        ({"a\nb": good}, "no name"),
        ({"a" * 201: good}, "no name"),
        ({"a": {**good, "params": {"n": 5}}}, "n cannot be set here"),
    ):
        with pytest.raises(ConfigError, match=match):
            parse_config({"members": members})


def test_what_costs_nothing_is_served_when_the_money_is_gone(provider, serve):
    dear = {"url": provider().url, "price": LARGE, "timeout_s": 0.3, "retries": 0, "max_tokens": 1}
    free = {**dear, "price": {"input": 0, "output": 0}, "url": provider().url}
    server = serve({"members": {"a": dear, "b": free}, "policies": {"p": "single:a"}})
    server.gateway.accounts.capped = True
    from skimp.runtime.cascade.rows import Budget, Reservation

    total = Budget("total", 1e-3)
    ledger = server.gateway.ledger

    async def spend():
        held = Reservation("1", "r", "a", (total,), 1e-3, time.time(), time.time() + 60)
        await ledger.reserve(held)
        from skimp.runtime.cascade.rows import Attempt

        used = Attempt("1", "r", held.at, "a", "ok", 1, 1, True, 1.0, 1.0, 2e-3, 0.0, 0.1)
        await ledger.settle(held, used)  # more than was reserved
        await ledger.reserve(Reservation("2", "r", "b", (total,), 0.0, held.at, held.expires))

    asyncio.run(spend())


def test_a_price_that_changed_since_calibration_is_told(provider, write_policy, serve, caplog):
    name = write_policy([("a", 1), ("b", 1)], [1.0], {"a": {"input": 0.1, "output": 0.9}})
    member = {"url": provider().url, "price": SMALL}
    serve({"members": {"a": member, "b": member}, "policies": {"p": name}})
    (told,) = [json.loads(r.message) for r in caplog.records if '"price"' in r.message]
    assert told["calibrated"]["output"] == 0.9
    assert told["configured"]["output"] == 0.2


def test_a_policy_without_an_end_to_its_budget_promises_nothing(provider, write_policy, serve):
    name = write_policy([("a", 1), ("b", 1)], [1.0], budget=float("inf"))
    member = {"url": provider().url, "price": SMALL}
    server = serve({"members": {"a": member, "b": member}, "policies": {"p": name}})
    post(server, "a=ok:1")
    (policy,) = httpx.get(f"{server.root}/api/summary").json()["policies"]
    assert policy["bound"] is None
