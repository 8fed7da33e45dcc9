"""What the server adds to a call: p50 and p99 over a direct call of the same member on loopback.

Four processes share the machine: a member that answers at once, the server, the one compared with
(litellm's proxy, if ``--litellm`` names its command), and this one, which asks. Rounds are
interleaved.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = "The answer is 42."
REPLY = {
    "id": "stub-1",
    "object": "chat.completion",
    "created": 1,
    "model": "stub",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
}


class Member(asyncio.Protocol):
    """An HTTP/1.1 server that says one thing, as fast as Python can."""

    payload = json.dumps(REPLY).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    reply = head % len(payload) + payload

    def connection_made(self, transport):
        """Start to listen."""
        self.transport, self.buffer = transport, b""

    def data_received(self, data):
        """Answer every request that is complete."""
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            found = re.search(rb"content-length: *(\d+)", self.buffer[:end], re.IGNORECASE)
            size = end + 4 + int(found[1]) if found else end + 4
            if len(self.buffer) < size:
                return
            self.buffer = self.buffer[size:]
            self.transport.write(self.reply)


class Asker(asyncio.Protocol):
    """One connection that asks, waits for the answer, and asks again."""

    def __init__(self, request, count, done):
        self.request, self.left, self.done = request, count, done
        self.seconds, self.buffer, self.body = [], b"", b""

    def connection_made(self, transport):
        """Ask for the first time."""
        self.transport = transport
        self.ask()

    def ask(self):
        """Send the request."""
        self.begun = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data):
        """Take the time when an answer is complete."""
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        found = re.search(rb"content-length: *(\d+)", self.buffer[:end], re.IGNORECASE)
        if len(self.buffer) < end + 4 + int(found[1]):
            return
        self.seconds.append(time.perf_counter() - self.begun)
        if not self.buffer.startswith(b"HTTP/1.1 200"):
            raise SystemExit(self.buffer.decode(errors="replace")[:500])
        self.body, self.buffer = self.buffer[end + 4 :], b""
        self.left -= 1
        if self.left:
            self.ask()
        else:
            self.transport.close()
            self.done.set_result(None)


async def ask(port, model, count, at_once, path="/v1/chat/completions"):
    """Seconds of each request, seconds in all, and the last text."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is 6 times 7?"}]}
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer sk-bench\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    each = max(1, count // at_once)
    begun = time.perf_counter()
    askers = []
    for _ in range(at_once):
        done = loop.create_future()
        make = lambda done=done: Asker(head.encode() + raw, each, done)  # noqa: E731
        _, asker = await loop.create_connection(make, "127.0.0.1", port)
        askers.append(asker)
    await asyncio.gather(*(a.done for a in askers))
    wall = time.perf_counter() - begun
    text = json.loads(askers[0].body)["choices"][0]["message"]["content"]
    return [s for a in askers for s in a.seconds], wall, text


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port, model, process, seconds=90):
    end = time.monotonic() + seconds
    while True:
        try:
            return asyncio.run(ask(port, model, 1, 1))
        except (OSError, SystemExit) as error:
            if time.monotonic() > end or process.poll() is not None:
                raise SystemExit(f"port {port} does not answer: {error}") from error
            time.sleep(0.3)


def start(folder, litellm, children):
    """Start the processes; where to ask each."""
    stub, ours, theirs = free_port(), free_port(), free_port()
    targets = {}

    def run(name, args, port, model):
        log = (folder / f"{name}.log").open("w")
        child = subprocess.Popen(args, stdout=log, stderr=log, cwd=folder)
        children.append(child)
        wait_for(port, model, child)
        targets[name] = (port, model)

    run("direct", [sys.executable, __file__, "--member", str(stub)], stub, "stub")
    member = {
        "url": f"http://127.0.0.1:{stub}/v1",
        "price": {"input": 0.1, "output": 0.2},
        "max_tokens": 64,
    }
    config = {"members": {"stub": member}, "budget": {"usd": 1e6}}
    (folder / "c.yaml").write_text(json.dumps(config))
    run(
        "skimp",
        [sys.executable, "-m", "skimp", "serve", "c.yaml", "--port", str(ours)],
        ours,
        "skimp",
    )
    if litellm:
        base = f"http://127.0.0.1:{stub}/v1"
        params = {"model": "openai/stub", "api_base": base, "api_key": "sk-none"}
        theirs_config = {
            "model_list": [{"model_name": "stub", "litellm_params": params}],
            "general_settings": {"dangerously_permit_weak_or_unset_master_key": True},
        }
        (folder / "l.yaml").write_text(json.dumps(theirs_config))
        args = [litellm, "--config", "l.yaml", "--port", str(theirs), "--host", "127.0.0.1"]
        run("litellm", args, theirs, "stub")
    return targets


def quantile(values, q):
    return statistics.quantiles(values, n=1000, method="inclusive")[int(q * 1000) - 1]


def compare(targets, at_once, count, rounds):
    """Medians over rounds of p50, p99 and requests per second, with their spread."""
    rows = {name: {"p50": [], "p99": [], "rate": []} for name in targets}
    for port, model in targets.values():
        asyncio.run(ask(port, model, max(at_once, 50), at_once))  # warm
    for _ in range(rounds):
        for name, (port, model) in targets.items():
            seconds, wall, text = asyncio.run(ask(port, model, count, at_once))
            if text != TEXT:
                raise SystemExit(f"{name} answered {text!r}: nothing is compared")
            rows[name]["p50"].append(1000 * quantile(seconds, 0.5))
            rows[name]["p99"].append(1000 * quantile(seconds, 0.99))
            rows[name]["rate"].append(len(seconds) / wall)
    table = {}
    for name, found in rows.items():
        line = {k: statistics.median(v) for k, v in found.items()}
        line |= {f"{k}_spread": [min(v), max(v)] for k, v in found.items()}
        table[name] = line
    for line in table.values():
        for k in ("p50", "p99"):
            line[f"{k}_over_direct"] = line[k] - table["direct"][k]
    return table


def cpu():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--litellm", help="the command of its proxy")
    parser.add_argument("--member", type=int, help="only be the member, at this port")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gateway.json"))
    args = parser.parse_args()
    if args.member:
        import uvloop

        async def member():
            loop = asyncio.get_running_loop()
            server = await loop.create_server(Member, "127.0.0.1", args.member)
            await server.serve_forever()

        uvloop.run(member())
        return
    rounds, scale = (2, 1) if args.quick else (5, 2)
    versions = {"python": platform.python_version(), "cores": os.cpu_count(), "cpu": cpu()}
    with tempfile.TemporaryDirectory() as name:
        children = []
        try:
            targets = start(Path(name), args.litellm, children)
            levels = {}
            for at_once, count in ((1, 100), (16, 320), (64, 640)):
                levels[at_once] = compare(targets, at_once, count * scale, rounds)
                for target, r in levels[at_once].items():
                    if not args.json:
                        print(
                            f"{at_once:3} at once, {target:8} p50 {r['p50']:8.2f} ms "
                            f"(+{r['p50_over_direct']:.2f})  p99 {r['p99']:8.2f} ms "
                            f"(+{r['p99_over_direct']:.2f})  {r['rate']:7.0f} requests/s",
                            flush=True,
                        )
        finally:
            for child in children:
                child.terminate()
            for child in children:
                child.wait(30)
    if args.litellm:
        python = Path(args.litellm).with_name("python")
        code = "from importlib.metadata import version; print(version('litellm'))"
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        versions["litellm"] = found.stdout.strip()
    result = {"versions": versions, "at_once": levels, "rounds": rounds}
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
