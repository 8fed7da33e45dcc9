"""Record what every member answers to some prompts: the traces that calibration reads."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...ir.errors import MALFORMED, CalibrationError
from .member import MemberError, choice_message
from .price import most_prompt_tokens
from .traces import MemberSpec, append, read_lines
from .trip import Entry


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Prompts, one JSON object per line: ``{"id", "prompt"}`` or ``{"id", "messages"}``.

    A line of ``{"question"}``, as in GSM8K, is a prompt too.
    """
    return [prompt for _, prompt in prompt_rows(path)]


def prompt_rows(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each line as it is, and the prompt that it is; see :func:`read_prompts`.

    Raises:
        CalibrationError: A line is no prompt; says which.
    """
    for at, line in read_lines(path):
        try:
            row = json.loads(line)
            text = row.get("prompt", row.get("question"))
            messages = row.get("messages") or [{"role": "user", "content": str(text)}]
            if text is None and "messages" not in row:
                raise ValueError("neither `prompt` nor `messages`")
        except MALFORMED as error:
            raise CalibrationError(f"{path}, line {at}: {error}") from error
        yield row, {"id": str(row.get("id", at)), "messages": messages}


async def collect(
    prompts: Sequence[Mapping[str, Any]],
    members: Sequence[tuple[Entry, MemberSpec]],
    out: Path,
    *,
    request: Mapping[str, Any] | None = None,
    at_once: int = 4,
    progress: Callable[[str, float, float], None] | None = None,
) -> int:
    """Ask every member for its samples of every prompt; lines already in ``out`` are kept.

    Args:
        prompts: What :func:`read_prompts` gave.
        members: With how many samples each draws.
        out: A line is added when a prompt is done, so an interruption loses one prompt at most.
        request: Fields of the requests; ``max_tokens`` is the member's own if not among them.
        at_once: Prompts under way.
        progress: Told how far it has come.

    Returns:
        How many prompts were asked now.
    """
    done = _done(out)
    waiting = iter([p for p in prompts if str(p["id"]) not in done])
    total, count = len(prompts), len(done)
    append(out)  # what cannot be written should not cost anything first

    async def worker() -> None:
        nonlocal count
        for prompt in waiting:
            line: dict[str, Any] = {"id": prompt["id"], "members": {}}
            for entry, spec in members:
                limit = {"max_tokens": entry.max_tokens}
                body = {**limit, **(request or {}), "messages": prompt["messages"]}
                line["members"][spec.name] = {"samples": await _samples(entry, spec, body)}
            append(out, line)
            count += 1
            if progress is not None:
                progress("collect", count, total)

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return count - len(done)


async def _samples(entry: Entry, spec: MemberSpec, body: dict[str, Any]) -> list[dict[str, Any]]:
    if spec.samples > 1:
        body["temperature"] = entry.temperature
    sizes = [spec.samples] if entry.member.batches else [1] * spec.samples
    found: list[dict[str, Any]] = []
    for n in sizes:
        asked = {**body, "n": n} if n > 1 else body
        try:
            reply = await entry.member.complete("chat/completions", asked)
        except MemberError as error:  # it may have cost what the server would say of it
            guess = 0 if error.free else most_prompt_tokens(asked) // 4
            failed = {"error": error.kind, "prompt_tokens": guess, "completion_tokens": 0}
            found += [failed | {"cost": entry.price.of(guess, 0)}]
            found += [{"error": error.kind, "cost": 0.0}] * (n - 1)
            continue
        choices = reply.body["choices"][:n]
        usage = reply.usage or _assumed(asked, choices)
        prompt = int(usage.get("prompt_tokens", 0))
        each, rest = divmod(int(usage.get("completion_tokens", 0)), len(choices))
        for i, choice in enumerate(choices):  # what the call used adds up over its samples
            content = choice_message(choice).get("content")
            tokens = prompt if i == 0 else 0, each + (i < rest)
            found.append(
                {
                    "text": content if isinstance(content, str) else json.dumps(content),
                    "prompt_tokens": tokens[0],
                    "completion_tokens": tokens[1],
                    "cost": entry.price.of(*tokens),
                }
            )
    return found + [{"error": "missing", "cost": 0.0}] * (spec.samples - len(found))


def _assumed(asked: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Usage where the member reports none, as the server would estimate it."""
    text = json.dumps([choice_message(c).get("content") for c in choices])
    return {"prompt_tokens": most_prompt_tokens(asked) // 4, "completion_tokens": len(text) // 4}


def _done(out: Path) -> set[str]:
    """The ids in the file; half a line, where a run was killed, is cut off."""
    if not out.exists():
        return set()
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return {str(json.loads(line)["id"]) for line in whole.splitlines() if line.strip()}
    except MALFORMED as error:
        raise CalibrationError(f"{out} holds something else than traces: {error}") from error
