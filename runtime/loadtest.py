"""Load sweeps: how a member behaves at each concurrency."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from .cascade.member import Member, MemberError, usage_in
from .economics import Level

PROMPTS = (
    "A train travels 60 miles in 1.5 hours. What is its speed in miles per hour?",
    "Name three rivers of Europe and the seas they flow into.",
    "Write one sentence that explains what a hash table is.",
    "If a shirt costs 20 dollars and is sold at 15% off, what is the price?",
)


async def sweep(
    member: Member,
    concurrency: Sequence[int],
    *,
    requests: int = 16,
    prompts: Sequence[str] = PROMPTS,
    max_tokens: int = 64,
    progress: Callable[[str, float, float], None] | None = None,
    each: Callable[[Level], None] | None = None,
) -> list[Level]:
    """Run a closed loop at each concurrency, streaming.

    Args:
        member: Who is measured.
        concurrency: The levels; one request before them warms up.
        requests: Per level, and at least as many as the level.
        prompts: Asked in turn.
        max_tokens: Of a completion.
        progress: Told what is being done.
        each: Given every level when it is done.
    """
    with_body = [_body(p, max_tokens) for p in prompts]
    await _one(member, with_body[0])
    levels = []
    for n in concurrency:
        level = await _level(member, n, max(requests, n), with_body, progress)
        levels.append(level)
        if each is not None:
            each(level)
    return levels


async def _level(
    member: Member,
    n: int,
    requests: int,
    bodies: Sequence[dict[str, Any]],
    progress: Callable[[str, float, float], None] | None,
) -> Level:
    numbers = iter(range(requests))
    turn = itertools.cycle(bodies)
    found: list[tuple[float, float, int, int]] = []
    failed = 0

    async def worker() -> None:
        nonlocal failed
        for _ in numbers:
            one = await _one(member, next(turn))
            if one is None:
                failed += 1
            else:
                found.append(one)
            if progress is not None:
                progress(f"n = {n}", len(found) + failed, requests)

    begun = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(n)))
    wall = time.perf_counter() - begun
    return Level(
        n,
        tuple(f[0] for f in found),
        tuple(f[1] for f in found),
        sum(f[2] for f in found),
        sum(f[3] for f in found),
        wall,
        failed,
    )


async def _one(member: Member, body: dict[str, Any]) -> tuple[float, float, int, int] | None:
    """Seconds to the first and to the last token, and the tokens; ``None`` if it failed."""
    begun = time.perf_counter()
    first, usage, pieces = None, None, 0
    try:
        stream: Any = member.stream("chat/completions", body)
        async with aclosing(stream):
            async for chunk in stream:
                usage = usage_in(chunk.data) or usage
                if chunk.data.get("choices"):
                    pieces += 1
                    first = time.perf_counter() - begun if first is None else first
    except MemberError:
        return None
    last = time.perf_counter() - begun
    usage = usage or {}
    prompt = int(usage.get("prompt_tokens", len(str(body["messages"])) // 4))
    return first or last, last, prompt, int(usage.get("completion_tokens", pieces))


def _body(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
