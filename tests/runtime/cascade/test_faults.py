"""Thousands of requests with faults, through the real command: nothing is lost, all adds up."""

import asyncio
import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

HERE = Path(__file__).parent
SMALL, LARGE = (0.13, 0.57), (2.9, 14.3)  # US dollars per million, in and out
FAULTS = ["429", "500", "malformed", "drop"]


class Command:
    """A child process whose first line of output matters."""

    def __init__(self, args, stream, log):
        self.log = log
        pipes = {"stdout": subprocess.PIPE, "stderr": log.open("w")}
        if stream == "stderr":
            pipes = {"stdout": subprocess.DEVNULL, "stderr": log.open("w")}
        self.process = subprocess.Popen([sys.executable, *args], text=True, **pipes)

    def line(self):
        return self.process.stdout.readline().strip()

    def kill(self, how=signal.SIGKILL):
        self.process.send_signal(how)
        self.process.wait(30)


@pytest.fixture
def children():
    found = []
    yield found
    for child in found:
        if child.process.poll() is None:
            child.kill()


def start_server(tmp_path, children, port=0):
    child = Command(
        ["-m", "skimp", "serve", str(tmp_path / "c.yaml"), "--port", str(port)],
        "stderr",
        tmp_path / f"serve-{len(children)}.log",
    )
    children.append(child)
    end = time.monotonic() + 150  # a busy machine may take minutes to import
    while time.monotonic() < end:
        found = re.search(r"http://127.0.0.1:(\d+)/", child.log.read_text())
        if found:
            url = f"http://127.0.0.1:{found[1]}"
            try:
                urllib.request.urlopen(f"{url}/healthz", timeout=2).read()
                return child, url
            except OSError:
                pass
        assert child.process.poll() is None, child.log.read_text()
        time.sleep(0.1)
    raise AssertionError("the server did not start")


def configure(tmp_path, write_policy, a, b, **more):
    """A cascade, a large member alone, and a member that never answers in time."""
    policy = write_policy([("small", 1), ("large", 1)], [1.0])

    def member(url, price, **extra):
        return {
            "url": url,
            "price": {"input": price[0], "output": price[1]},
            "retries": 0,
            "timeout_s": 60,
            "max_tokens": 32,
            **extra,
        }

    config = {
        "members": {
            "small": member(a, SMALL, fallback=["large"]),
            "large": member(b, LARGE),
            "never": member(a, SMALL, timeout_s=0.3, fallback=["large"]),
        },
        "policies": {"cascade": policy},
        "ledger": f"sqlite:///{tmp_path}/ledger.db",
        **more,
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))  # JSON is YAML


def what(i):
    """The i-th request: its text, whether it streams, and what becomes of it."""
    if i % 200 == 7:
        return f"n={i} large=stall", False, "hang up", "large"
    if i % 200 == 19:
        return f"n={i} large=halt:3", True, "hang up", "large"
    if i % 200 == 41:
        return f"n={i} large=break:2", True, "answer", "large"  # the answer ends in an error
    if i % 100 == 3:
        return f"n={i} never=stall large=ok:4", i % 200 == 3, "answer", "never"
    if i % 20 == 11:
        fault = FAULTS[i // 20 % 4]
        return f"n={i} small={fault} large=ok:4", i % 40 == 11, "answer", "skimp"
    if i % 20 == 12:
        return f"n={i} small={FAULTS[i // 20 % 2]} large=500", False, "fail", "skimp"
    if i % 10 == 1:
        return f"n={i} small=ok:none large=ok:5", i % 20 == 1, "answer", "skimp"
    return f"n={i} small=ok:{i % 9}", i % 5 == 0, "answer", "skimp"


async def one(session, url, i):
    text, stream, fate, model = what(i)
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": text}]}
    try:
        limit = 0.4 if fate == "hang up" and not stream else 120
        async with asyncio.timeout(limit):
            async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                if fate == "hang up":
                    seen = b""
                    while seen.count(b"data:") < 3:
                        seen += await response.content.readany()
                    response.close()
                    return "hang up", response.headers["x-skimp-request"]
                raw = await response.read()
                if response.status != 200:
                    return str(response.status), None
                assert raw.rstrip().endswith(b"data: [DONE]") if stream else json.loads(raw)
                return "answer", response.headers["x-skimp-request"]
    except TimeoutError:
        assert fate == "hang up"
        return "hang up", None


async def load(url, numbers, at_once=48):
    """A bounded closed loop."""
    waiting = iter(numbers)
    found = Counter()
    ids = []

    async def worker(session):
        for i in waiting:
            fate, name = await one(session, url, i)
            found[fate] += 1
            if name and fate == "answer":
                ids.append(name)

    connector = aiohttp.TCPConnector(limit=0, force_close=False)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(worker(session) for _ in range(at_once)))
    return found, ids


def seen(url):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/seen", timeout=10) as reply:
        return json.load(reply)


def table(path, name):
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    found = [dict(r) for r in connection.execute(f"SELECT * FROM {name}")]
    connection.close()
    return found


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.nightly)])
@pytest.mark.timeout(500)
def test_the_ledger_is_exact_over_thousands_of_requests_with_faults(
    tmp_path, children, write_policy, free_port, count
):
    stubs = []
    for i in range(2):
        child = Command([str(HERE / "stub.py")], "stdout", tmp_path / f"stub-{i}.log")
        children.append(child)
        stubs.append(child.line())
    configure(tmp_path, write_policy, *stubs, budget={"usd": 1e6})
    server, url = start_server(tmp_path, children, free_port())
    found, ids = asyncio.run(load(url, range(count)))
    expect = Counter(
        {"answer": "answer", "hang up": "hang up", "fail": "502"}[what(i)[2]] for i in range(count)
    )
    assert found == expect
    path = tmp_path / "ledger.db"
    end = time.monotonic() + 20
    while len(table(path, "requests")) < count or table(path, "reservations"):
        assert time.monotonic() < end, "some requests were never recorded"
        time.sleep(0.2)
    server.kill()  # no time to tidy up: what matters is on disk
    requests, attempts = table(path, "requests"), table(path, "attempts")
    assert len(requests) == count
    assert len({r["id"] for r in requests}) == count
    assert set(ids) <= {r["id"] for r in requests}
    billed = Counter()
    for stub in map(seen, stubs):
        for model, (prompt, completion) in stub["billed"].items():
            billed[model, "in"] += prompt
            billed[model, "out"] += completion
    provider = math.fsum(
        (billed[m, "in"] * p[0] + billed[m, "out"] * p[1]) * 1e-6
        for m, p in (("small", SMALL), ("large", LARGE), ("never", SMALL))
    )
    ledger = math.fsum(a["cost"] for a in attempts)
    assert provider > 0
    assert abs(ledger - provider) < 1e-9
    assert abs(math.fsum(r["cost"] for r in requests) - provider) < 1e-9
    (book,) = table(path, "budgets")
    guessed = math.fsum(a["estimate"] for a in attempts)
    assert abs(book["spent"] - ledger - guessed) < 1e-9
    assert abs(book["reserved"]) < 1e-9
    status = Counter(a["status"] for a in attempts)
    for kind in ("429", "500", "malformed", "connection", "timeout", "cancelled"):
        assert status[kind] > 0, kind
    broken = sum(r["status"] == "broken" for r in requests)
    assert broken == sum("large=break" in what(i)[0] for i in range(count))
    halted = [a for a in attempts if a["status"] == "cancelled" and a["completion_tokens"]]
    assert len(halted) == sum(what(i)[0].endswith("halt:3") for i in range(count))
    assert all(a["completion_tokens"] == 3 for a in halted)


@pytest.mark.timeout(300)
def test_killed_in_the_middle_nothing_that_was_answered_is_lost(
    tmp_path, children, write_policy, free_port
):
    child = Command([str(HERE / "stub.py")], "stdout", tmp_path / "stub.log")
    children.append(child)
    stub = child.line()
    configure(tmp_path, write_policy, stub, stub, budget={"usd": 0.05})
    port = free_port()
    server, url = start_server(tmp_path, children, port)
    answered = []

    async def work():
        async def worker(session, start):
            for i in range(start, 3000, 16):
                body = {
                    "model": "skimp",
                    "messages": [{"role": "user", "content": f"n={i} small=ok:1"}],
                }
                try:
                    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                        if response.status == 200:
                            await response.read()
                            answered.append(response.headers["x-skimp-request"])
                except aiohttp.ClientError:
                    return
                if len(answered) == 300:
                    os.kill(server.process.pid, signal.SIGKILL)

        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(worker(session, s) for s in range(16)))

    asyncio.run(work())
    server.process.wait(10)
    assert len(answered) >= 300
    path = tmp_path / "ledger.db"
    assert set(answered) <= {r["id"] for r in table(path, "requests")}
    before = table(path, "reservations")
    _, url = start_server(tmp_path, children, port)
    (book,) = table(path, "budgets")
    held = math.fsum(r["amount"] for r in before)  # still held: they may have been billed
    assert book["reserved"] == pytest.approx(held, abs=1e-12)
    assert book["spent"] == pytest.approx(
        math.fsum(a["cost"] + a["estimate"] for a in table(path, "attempts")), abs=1e-12
    )


@pytest.mark.timeout(300)
def test_a_budget_is_not_exceeded_by_many_at_once(tmp_path, provider, write_policy, serve):
    stub = provider()
    dear = {"url": stub.url, "price": {"input": 3, "output": 15}, "retries": 0, "max_tokens": 20}
    cap = 0.02
    server = serve(
        {
            "members": {"large": dear},
            "policies": {"only": "single:large"},
            "budget": {"usd": cap},
        }
    )

    async def work():
        found = Counter()

        async def worker(session, start):
            for i in range(start, 600, 32):
                text = f"n={i} large=slow:0.01"
                body = {"model": "skimp", "messages": [{"role": "user", "content": text}]}
                async with session.post(f"{server.url}/chat/completions", json=body) as response:
                    found[response.status] += 1

        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(worker(session, s) for s in range(32)))
            first = found.copy()
            for _ in range(200):  # what reservations of the crowd held back is spent one by one
                before = found[429]
                await worker(session, 599)
                if found[429] > before:
                    break
        return first

    found = asyncio.run(work())
    assert found[200] + found[429] == 600
    assert found[429] > 100
    spent = math.fsum(a["cost"] + a["estimate"] for a in server.rows("attempts"))
    one = (most_prompt() * 3 + 20 * 15) * 1e-6
    assert cap - one <= spent <= cap  # used up, and not by more than there is
    assert abs(math.fsum(r["cost"] for r in server.rows("requests")) - spent) < 1e-9


def most_prompt():
    from skimp.runtime.cascade.price import most_prompt_tokens

    return most_prompt_tokens({"messages": [{"role": "user", "content": "n=100 large=slow:0.01"}]})
