"""Responses by what was asked: nothing is paid for twice.

A response is stored under the hash of who was asked, the prompt, the parameters and which sample
it was. A training run that is started again, or with other rewards, finds all of it there.
"""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...ir.errors import MALFORMED, CalibrationError
from .member import MemberError, choice_message, pause
from .price import Price, most_prompt_tokens
from .traces import MemberSpec, append, read_lines
from .trip import Entry

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Response:
    """One sample of a member.

    Attributes:
        text: What it said.
        cost: US dollars.
        answer: Already extracted, if it was.
        score: Recorded quality in 0 to 1, if there is one.
        prompt_tokens: 0 where a sample shares its prompt with another, or they are not known.
        completion_tokens: ``None`` where they are not known.
        error: Why there was none; asked again in the next run.
    """

    text: str
    cost: float
    answer: str | None = None
    score: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    error: str | None = None


def prompt_hash(messages: Messages) -> str:
    """SHA-256 of the messages."""
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True).encode()).hexdigest()


def response_key(model: str, prompt: str, params: Mapping[str, Any], sample: int) -> str:
    """The address of a response: who, the prompt's hash, how, and which sample."""
    told = json.dumps([model, prompt, dict(params), sample], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


class ResponseCache:
    """Responses on disk, one JSON object per line, added to as they come.

    Args:
        path: Read if it is there; ``None`` keeps them in memory.

    Raises:
        CalibrationError: The file holds something else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.hits = self.misses = 0
        self._known: dict[str, Response] = {}
        self.models: dict[str, int] = {}
        self._params: dict[str, set[str]] = {}
        if path is not None and path.exists():
            self._read(path)

    def __len__(self) -> int:
        return len(self._known)

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # half a line, where a run was killed
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for at, line in read_lines(path):
            try:
                row = json.loads(line)
                response = Response(**row["response"])
                self._keep(row["key"], row["model"], row["params"], row["sample"], response)
            except MALFORMED as error:
                raise CalibrationError(f"{path}, line {at}: no response: {error!r}") from error

    def _keep(
        self, key: str, model: str, params: Mapping[str, Any], sample: int, response: Response
    ) -> None:
        self._known[key] = response
        self._params.setdefault(model, set()).add(json.dumps(dict(params), sort_keys=True))
        self.models[model] = max(self.models.get(model, 0), sample + 1)

    def params_of(self, model: str) -> dict[str, Any]:
        """The parameters that a member's responses were recorded with."""
        known = self._params.get(model, {"{}"})
        if len(known) > 1:
            raise CalibrationError(
                f"{model!r} was recorded with {len(known)} sets of parameters: give --config to "
                "say which of them is meant"
            )
        found: dict[str, Any] = json.loads(next(iter(known)))
        return found

    def get(
        self, model: str, messages: Messages, params: Mapping[str, Any], sample: int = 0
    ) -> Response | None:
        """What is known."""
        found = self._known.get(response_key(model, prompt_hash(messages), params, sample))
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(
        self,
        model: str,
        messages: Messages,
        params: Mapping[str, Any],
        sample: int,
        response: Response,
    ) -> None:
        """Keep a response; on disk before this returns."""
        prompt = prompt_hash(messages)
        key = response_key(model, prompt, params, sample)
        self._keep(key, model, params, sample, response)
        if self.path is None or response.error is not None:
            return
        row: dict[str, Any] = {"key": key, "model": model, "prompt": prompt, "params": dict(params)}
        row |= {"sample": sample, "response": asdict(response)}
        append(self.path, row)


class Replay:
    """Members whose responses are known, and are asked only for what is not.

    Args:
        cache: Where responses are.
        specs: Members, samples and prices; where a price is given and tokens are known, it
            overrules the recorded cost.
        entries: Who to ask for what is missing; without them that is an error.
    """

    def __init__(
        self,
        cache: ResponseCache,
        specs: Sequence[MemberSpec],
        entries: Mapping[str, Entry] | None = None,
    ) -> None:
        self.cache, self.entries = cache, dict(entries or {})
        self.specs = {s.name: s for s in specs}
        self.params = {
            s.name: call_params(self.entries[s.name], s.samples)
            if s.name in self.entries
            else cache.params_of(s.name)
            for s in specs
        }
        self._runner: asyncio.Runner | None = None
        self.spent = 0.0

    def __call__(self, member: str, messages: Messages) -> list[Response]:
        """The samples of a member.

        Raises:
            CalibrationError: One is not recorded, and there is nobody to ask.
        """
        spec = self.specs[member]
        found, params = [], self.params[member]
        for sample in range(spec.samples):
            response = self.cache.get(member, messages, params, sample)
            if response is None:
                response = self._ask(member, messages, sample)
                self.cache.put(member, messages, params, sample, response)
            found.append(_priced(response, spec.price))
        return found

    def _ask(self, member: str, messages: Messages, sample: int) -> Response:
        entry = self.entries.get(member)
        if entry is None:
            start = str(messages[-1].get("content"))[:60]
            raise CalibrationError(
                f"no recorded response of {member!r}, sample {sample}, to a prompt of "
                f"{len(messages)} messages that ends in {start!r}: give --config to ask for it"
            )
        if self._runner is None:
            self._runner = asyncio.Runner()
        response = self._runner.run(ask(entry, messages, self.params[member]))
        self.spent += response.cost
        return response

    def close(self) -> None:
        """Close the members that were asked."""
        if self._runner is not None:
            for entry in self.entries.values():
                self._runner.run(entry.member.close())
            self._runner.close()
            self._runner = None


def call_params(entry: Entry, samples: int) -> dict[str, Any]:
    """What a call of a member is made with, its prompt aside."""
    defaults = dict(getattr(entry.member, "defaults", {}))
    found = {"max_tokens": entry.max_tokens, **defaults}
    return found | ({"temperature": entry.temperature} if samples > 1 else {})


async def ask(entry: Entry, messages: Messages, params: Mapping[str, Any]) -> Response:
    """One sample of a member, tried again where that may help.

    A failure is an empty text; it and what was tried before may have cost something.
    """
    body = {**params, "messages": [dict(m) for m in messages]}
    spent = 0.0
    for tries in range(entry.retries + 1):
        try:
            reply = await entry.member.complete("chat/completions", body)
            break
        except MemberError as error:
            spent += 0.0 if error.free else entry.price.of(most_prompt_tokens(body) // 4, 0)
            if not error.transient or tries == entry.retries:
                return Response("", spent, error=f"{error.kind}: {error.message}")
            await pause(error, tries)
    content = choice_message(reply.body["choices"][0]).get("content")
    text = content if isinstance(content, str) else json.dumps(content)
    usage = reply.usage
    tokens = most_prompt_tokens(body) // 4, len(text) // 4
    if usage is not None:
        tokens = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
    return Response(text, spent + entry.price.of(*tokens), None, None, *tokens)


def _priced(response: Response, price: Price | None) -> Response:
    if price is None or response.completion_tokens is None:
        return response
    return replace(response, cost=price.of(response.prompt_tokens, response.completion_tokens))
