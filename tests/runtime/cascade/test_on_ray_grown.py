"""Serving on a Ray cluster of two nodes: the command line, several gateways, more processes."""

import concurrent.futures
import subprocess
import sys
import time

import httpx
import openai
import pytest

pytest.importorskip("ray.serve")
import yaml
from ray import serve as ray_serve
from ray.runtime_context import get_runtime_context
from skimp.runtime.cascade.on_ray import APPLICATION

pytestmark = pytest.mark.nightly
PRICE = {"input": 1, "output": 3}
COST = (11 * PRICE["input"] + 7 * PRICE["output"]) * 1e-6
"""Of a request at the provider."""


def ask(url, model, text, **more):
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, **more)


def many(url, model, text, count, **more):
    """What came of requests that are all under way at once: answers, and errors."""

    def one(_):
        try:
            return ask(url, model, text, **more)
        except openai.APIStatusError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def running(name):
    """How many processes of a deployment serve."""
    found = ray_serve.status().applications[APPLICATION].deployments[name]
    return found.replica_states.get("RUNNING", 0)


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


def test_the_command_line_serves_changes_and_stops(cluster, provider, tmp_path):
    far, root = provider(), f"http://127.0.0.1:{cluster}"
    members = {n: {"url": far.url, "price": PRICE} for n in ("one", "two")}
    config = {
        "members": members,
        "policies": {"first": "single:one", "second": "single:two"},
        "active": "first",
        "ledger": "sqlite:///books.db",
        "server": {"port": cluster},
    }
    file = tmp_path / "cascade.yaml"

    def skimp(*told):
        command = [sys.executable, "-m", "skimp", "serve", *map(str, told)]
        address = get_runtime_context().gcs_address
        ran = subprocess.run(
            [*command, "--ray", address], capture_output=True, text=True, timeout=250, check=False
        )
        return ran.returncode, ran.stderr

    def text():
        return ask(f"{root}/v1", "skimp", "one=ok:1 two=ok:2").choices[0].message.content

    file.write_text(yaml.safe_dump(config))
    code, told = skimp(file)
    assert code == 0, told
    assert f"at {root}/" in told.replace("\n", "")
    assert text() == "1"
    file.write_text(yaml.safe_dump(config | {"active": "second"}))
    assert skimp(file)[0] == 0
    assert text() == "2"
    file.write_text(yaml.safe_dump(config | {"callers": {"a": {"key": "NOT_ON_THE_NODES"}}}))
    code, told = skimp(file)
    assert code == 1
    assert "NOT_ON_THE_NODES" in told
    assert text() == "2"  # what served before serves on
    assert skimp("--stop")[0] == 0
    with pytest.raises(openai.NotFoundError):
        text()
    assert httpx.get(f"{root}/healthz").text != "ok"
    assert (tmp_path / "books.db").exists()
    assert far.calls == {"one": 1, "two": 2}


@pytest.mark.parametrize("serve", ["ray"], indirect=True)
def test_two_gateways_keep_one_ledger(serve, provider, postgres):
    far = provider()
    config = {
        "members": {"far": {"url": far.url, "price": PRICE, "max_tokens": 7}},
        "ledger": postgres,
        "server": {"replicas": {"min": 2, "max": 2}},
    }
    server = serve(config)
    until(lambda: running("gateway") == 2, 60)
    replies = many(server.url, "far", "far=slow:0.5", 25)  # of which two cannot have as many
    assert all(r.usage.completion_tokens == 7 for r in replies)
    counts = set()

    def both():
        text = httpx.get(f"{server.root}/metrics").text
        lines = [x for x in text.splitlines() if x.startswith("skimp_requests_total")]
        counts.add(sum(float(x.rsplit(" ", 1)[1]) for x in lines))
        return len(counts) == 2

    until(both, 30)
    assert sum(counts) == 25
    assert 0 not in counts
    server.wait(lambda: len(server.rows("requests")) == 25)
    assert sum(a["cost"] for a in server.rows("attempts")) == pytest.approx(25 * COST, abs=1e-15)
    assert httpx.get(f"{server.root}/api/summary").json()["cost"] == pytest.approx(25 * COST)


@pytest.mark.parametrize("serve", ["ray"], indirect=True)
def test_two_gateways_keep_one_budget(serve, provider, postgres):
    far, allowed = provider(), 10.5
    config = {
        "members": {"far": {"url": far.url, "price": PRICE, "max_tokens": 7}},
        "ledger": postgres,
        "server": {"replicas": {"min": 2, "max": 2}},
        "budget": {"usd": allowed * COST},
    }
    server = serve(config)
    until(lambda: running("gateway") == 2, 60)
    served = refused = 0
    for _ in range(40):
        replies = many(server.url, "far", "far=ok:1", 4)
        answers = [r for r in replies if not isinstance(r, Exception)]
        served, refused = served + len(answers), refused + 4 - len(answers)
    assert served + refused == 160
    assert served == far.calls["far"]
    assert 1 <= served <= allowed
    assert sum(a["cost"] for a in server.rows("attempts")) == pytest.approx(served * COST)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("serve", ["ray"], indirect=True)
def test_a_local_member_gets_a_second_process_under_load(serve, llama, tmp_path):
    for part in llama:
        part.save_pretrained(tmp_path / "tiny")
    tiny = {"local": str(tmp_path / "tiny"), "price": PRICE, "replicas": {"max": 2}}
    server = serve({"members": {"tiny": tiny}, "server": {"timeout_s": 120}})
    assert running("member-tiny") == 1
    end = time.monotonic() + 240
    asked = 0
    while running("member-tiny") < 2:
        assert time.monotonic() < end, "it stayed alone"
        replies = many(server.url, "tiny", "hello", 12, max_tokens=400)
        assert not [r for r in replies if isinstance(r, Exception)]
        asked += len(replies)
    replies = many(server.url, "tiny", "hello", 4, max_tokens=5)
    assert len({r.choices[0].message.content for r in replies}) == 1
    server.wait(lambda: len(server.rows("requests")) == asked + 4)
    assert server.rows("reservations") == []
