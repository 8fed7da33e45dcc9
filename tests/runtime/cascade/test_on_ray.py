"""Serving on a Ray cluster of two nodes; test_server's tests run there too, nightly."""

import asyncio
import threading

import openai
import pytest

pytest.importorskip("ray.serve")
from skimp.runtime.cascade.build import build_policies
from skimp.runtime.cascade.config import ConfigError, parse_config
from skimp.runtime.cascade.local import LocalModel
from skimp.runtime.cascade.on_ray import deploy, packed, unpacked

PRICE = {"input": 1, "output": 3}


def ask(server, model, text, **more):
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, **more)


@pytest.mark.nightly
@pytest.mark.parametrize("serve", ["ray"], indirect=True)
def test_local_members_apart_and_a_policy_that_changes_meanwhile(serve, provider, llama, tmp_path):
    for part in llama:
        part.save_pretrained(tmp_path / "tiny")
    far = provider()
    config = {
        "members": {
            "tiny": {"local": str(tmp_path / "tiny"), "price": PRICE, "replicas": {"max": 2}},
            "far": {"url": far.url, "price": PRICE},
        },
        "policies": {"near": "single:tiny", "away": "single:far"},
    }
    server = serve(config)
    here = LocalModel.load(str(tmp_path / "tiny"))
    request = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}
    want = asyncio.run(here.complete("chat/completions", request)).body
    whole = ask(server, "skimp", "hello", max_tokens=12)
    assert whole.choices[0].message.content == want["choices"][0]["message"]["content"]
    assert whole.usage.completion_tokens == want["usage"]["completion_tokens"]
    chunks = list(ask(server, "skimp", "hello", max_tokens=12, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3
    with pytest.raises(openai.BadRequestError, match="the model takes 512"):
        ask(server, "tiny", "x" * 600)

    said = []
    asked = threading.Thread(target=lambda: said.append(ask(server, "far", "far=slow:6")))
    asked.start()
    server.wait(lambda: far.under_way == 1)
    again = serve({**config, "active": "away"})
    assert asked.is_alive()  # the old gateway still has a request under way
    assert ask(again, "skimp", "far=ok:7").choices[0].message.content == "7"
    asked.join(30)
    assert said[0].choices[0].message.content == "42"
    server.wait(lambda: len(server.rows("requests")) == 5)  # in the one ledger of both
    assert server.rows("reservations") == []


def test_several_gateways_need_postgresql(tmp_path):
    member = {"url": "http://127.0.0.1:9/v1", "price": PRICE}
    data = {"members": {"a": member}, "server": {"replicas": {"max": 3}}}
    with pytest.raises(ConfigError, match=r"3 gateways .* cannot share SQLite"):
        deploy(parse_config(data), tmp_path, "127.0.0.1", 1)
    data["server"]["replicas"]["min"] = 4
    with pytest.raises(ConfigError, match="max 3 is less than min 4"):
        parse_config(data)


def test_a_configuration_travels_with_its_files(write_policy, tmp_path):
    member = {"url": "http://127.0.0.1:9/v1", "price": PRICE}
    name = write_policy([("a", 3), ("b", 1)], [0.6])
    config = parse_config({"members": {"a": member, "b": member}, "policies": {"p": name}})
    told = packed(config, tmp_path)
    (tmp_path / name).unlink()
    with unpacked(told) as (there, folder):
        policy = build_policies(there, folder)["p"]
        assert there.members == config.members
    assert policy.thresholds == (0.6,)
    assert not folder.exists()
