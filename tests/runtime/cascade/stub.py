"""An OpenAI-compatible provider that does as it is told, and remembers what it billed.

The last message says what each model does: ``small=429 large=ok:42``. Also run as a script, to
have a process of its own.
"""

import argparse
import asyncio
import json
import threading
from collections import Counter

from aiohttp import web

PROMPT, COMPLETION = 11, 7  # tokens of every prompt, and of every sample


class Stub:
    """The provider; ``url`` once it runs."""

    def __init__(self):
        self.calls = Counter()
        self.billed = {}
        self.bodies = []
        self.keys = []
        self.turn = Counter()
        self.under_way = 0
        self.url = ""

    def app(self):
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/seen", self.seen)
        return app

    async def seen(self, request):
        return web.json_response({"calls": self.calls, "billed": self.billed})

    def bill(self, model, prompt, completion):
        have = self.billed.get(model, (0, 0))
        self.billed[model] = (have[0] + prompt, have[1] + completion)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    async def complete(self, request):
        body = await request.json()
        model, chat = body["model"], "messages" in body
        self.calls[model] += 1
        self.keys.append(request.headers.get("authorization"))
        if len(self.bodies) < 1000:
            self.bodies.append(body)
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        if isinstance(text, list):
            text = " ".join(p if isinstance(p, str) else p.get("text", "") for p in text)
        told = dict(t.split("=", 1) for t in text.split() if "=" in t)
        act, _, rest = told.get(model, "ok:42").partition(":")
        self.under_way += 1
        try:
            return await self.act(request, body, model, chat, act, rest)
        finally:
            self.under_way -= 1

    async def act(self, request, body, model, chat, act, rest):
        if act == "302":
            return web.json_response({"moved": True}, status=302, headers={"location": "/x"})
        if act == "later":
            return web.json_response({}, status=429, headers={"retry-after": rest})
        if act.isdigit():
            error = {"error": {"message": f"told to say {act}", "type": "stub", "code": act}}
            headers = {"retry-after": "0"} if act == "429" else {}
            return web.json_response(error, status=int(act), headers=headers)
        if act == "stall":
            await asyncio.sleep(600)
        if act == "malformed":
            return web.Response(text='{"choices": [{"message"', content_type="application/json")
        if act == "drop":
            request.transport.abort()
            return web.Response()
        if act == "slow":
            await asyncio.sleep(float(rest))
            rest = "42"
        prompts = 1 if chat or isinstance(body["prompt"], str) else len(body["prompt"])
        n = body.get("n", 1) * prompts + 4 * (act == "extra")
        answers = rest.split("|")
        texts = []
        for _ in range(n):
            texts.append(answers[self.turn[model, rest] % len(answers)])
            self.turn[model, rest] += 1
        if body.get("stream"):
            return await self.stream(request, body, model, chat, act, rest, texts[0])
        choices = [self.choice(i, t, chat, body) for i, t in enumerate(texts)]
        usage = self.bill(model, PROMPT, COMPLETION * n)
        if act == "usage":
            usage = json.loads(rest)
        if act == "calls":
            choices[0]["message"] |= {"tool_calls": json.loads(rest)}
        return web.json_response(
            {"id": "stub-1", "object": "x", "model": model, "choices": choices, "usage": usage}
        )

    def choice(self, i, text, chat, body):
        if not chat:
            return {"index": i, "text": text, "finish_reason": "stop"}
        message = {"role": "assistant", "content": text}
        if body.get("tools"):
            name = body["tools"][0]["function"]["name"]
            call = {"name": name, "arguments": json.dumps({"x": text})}
            message = {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": f"call-{i}", "type": "function", "function": call}],
            }
        return {"index": i, "message": message, "finish_reason": "stop"}

    async def stream(self, request, body, model, chat, act, rest, text):
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def send(data):
            raw = data if isinstance(data, str) else json.dumps(data)
            await response.write(f"data: {raw}\n\n".encode())

        def piece(text, finish=None):
            delta = {"delta": {"content": text}} if chat else {"text": text}
            return {
                "id": "s",
                "model": model,
                "choices": [{"index": 0, "finish_reason": finish, **delta}],
            }

        if act == "flood":
            for _ in range(4000):
                await send(piece("x" * 16384))
        pieces = int(rest) if act in ("halt", "break") else 5
        for i in range(pieces):
            await send(piece(f"{text} " if act == "ok" and i == 0 else f"w{i} "))
        if act == "halt":
            await asyncio.sleep(600)
        if act == "break":
            await asyncio.sleep(0.2)  # a reset takes back what has not been read yet
            request.transport.abort()
            return response
        await send(piece("", "stop"))
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = self.bill(model, PROMPT, COMPLETION)
            await send({"id": "s", "model": model, "choices": [], "usage": usage})
        await send("[DONE]")
        return response

    async def listen(self, port=0):
        self.runner = web.AppRunner(
            self.app(), shutdown_timeout=0.1, handler_cancellation=True, lingering_time=0
        )
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", port)
        await site.start()
        number = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{number}/v1"


class Background:
    """An event loop in a thread."""

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        return self

    def run(self, work, timeout=30):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    stub = Stub()
    await stub.listen(parser.parse_args().port)
    print(stub.url, flush=True)  # noqa: T201
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
