"""A stand-in for a model server: multiplies, is wrong now and then, and speaks OpenAI's API."""

import argparse
import itertools
import json
import random
import re
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WRONG = 0.0
asked = defaultdict(itertools.count)


def answer(question):
    """The product, or a number near it; the same each time the example runs."""
    a, b = (int(x) for x in re.findall(r"\d+", question)[-2:])
    chance = random.Random(f"{a} {b} {next(asked[a, b])}")
    off = chance.choice([-20, -10, -2, 2, 10, 20]) if chance.random() < WRONG else 0
    return f"{a} times {b} is {a * b + off}."


class Member(BaseHTTPRequestHandler):
    """One endpoint: chat completions, whole or in chunks."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        """Answer a request."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = answer(body["messages"][-1]["content"])
        prompt = sum(len(m["content"].split()) for m in body["messages"])
        usage = {"prompt_tokens": prompt, "completion_tokens": len(text.split())}
        usage["total_tokens"] = sum(usage.values())
        head = {"id": "example", "created": 0, "model": body["model"]}
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            whole = head | {"object": "chat.completion", "choices": [choice], "usage": usage}
            return self.send("application/json", json.dumps(whole))
        head["object"] = "chat.completion.chunk"
        parts = [
            head | {"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]}
            for word in re.findall(r"\S+\s*", text)
        ]
        parts.append(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        parts.append(head | {"choices": [], "usage": usage})
        events = [*map(json.dumps, parts), "[DONE]"]
        return self.send("text/event-stream", "".join(f"data: {e}\n\n" for e in events))

    def send(self, kind, text):
        """Send a body."""
        raw = text.encode()
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        """Say nothing."""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int)
    parser.add_argument("--wrong", type=float, default=0.0, help="share of wrong answers")
    parser.add_argument("--questions", type=int, help="print so many questions instead")
    args = parser.parse_args()
    if args.questions:
        chance = random.Random(0)
        for i in range(args.questions):
            prompt = f"What is {chance.randint(2, 99)} * {chance.randint(2, 99)}?"
            print(json.dumps({"id": i, "prompt": prompt}))
        return
    global WRONG
    WRONG = args.wrong
    ThreadingHTTPServer(("127.0.0.1", args.port), Member).serve_forever()


if __name__ == "__main__":
    main()
