"""From a request to an answer: ask the policy, call members, account for every call.

Knows nothing of HTTP servers; :mod:`skimp.runtime.cascade.server` does. Only an answer that is
served whatever it says may stream; votes are kept back until they are counted.
"""

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir.errors import SkimpError
from .drift import Drift
from .extract import Extractor, answer_of, extractor, vote
from .ledger import Attempt, Budget, BudgetExceededError, Ledger, Request, Reservation
from .member import Chunk, Kind, Member, MemberError, Reply, choice_message, usage_in
from .metrics import Metrics
from .policy import Call, Hop, Policy, Serve
from .price import Price

IMAGE_TOKENS = 2000
"""Reserved for an image, whose bytes say little of its tokens."""


class UnavailableError(SkimpError):
    """Nobody answered; carries the last member's error."""

    def __init__(self, message: str, cause: MemberError | None = None) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Entry:
    """A member with what the gateway knows of it."""

    name: str
    member: Member
    price: Price
    retries: int = 1
    max_tokens: int = 1024
    fallback: tuple[str, ...] = ()
    temperature: float = 0.7  # of votes: samples at temperature 0 agree whether right or not


@dataclass(frozen=True, slots=True)
class Query:
    """A request as it came: the OpenAI body, untouched, and who asks."""

    kind: Kind
    body: Mapping[str, Any]
    caller: str = "anyone"
    budgets: tuple[Budget, ...] = ()

    @property
    def stream(self) -> bool:
        """Whether the caller wants chunks."""
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        """Whether the caller wants a chunk with usage."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))


@dataclass(slots=True)
class Trip:
    """One request under way."""

    query: Query
    policy: Policy
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    hops: list[Hop] = field(default_factory=list)
    replies: list[tuple[Reply, int] | None] = field(default_factory=list)
    route: list[dict[str, Any]] = field(default_factory=list)
    cost: float = 0.0
    estimate: float = 0.0
    served: str | None = None
    confidence: float | None = None
    finished: bool = False

    @property
    def path(self) -> str:
        """The route in short: ``small:0.40>large``."""
        return ">".join(
            r["member"]
            + (f":{r['confidence']:.2f}" if r.get("confidence") is not None else "")
            + ("!" if r["status"] != "ok" else "")
            for r in self.route
        )

    def report(self) -> dict[str, Any]:
        """What the response says of the route."""
        return {
            "request": self.id,
            "policy": self.policy.name,
            "route": self.route,
            "cost": self.cost,
            "estimate": self.estimate,
        }

    def headers(self) -> dict[str, str]:
        """What the response's headers say of it, as far as it is known."""
        return {
            "x-skimp-request": self.id,
            "x-skimp-policy": self.policy.name,
            "x-skimp-route": self.path,
            "x-skimp-cost": f"{self.cost:.9f}",
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """Either a body or a stream of the data of server-sent events.

    ``report`` tells the route and its cost; of a stream, once that has ended.
    """

    headers: dict[str, str]
    body: dict[str, Any] | None = None
    stream: AsyncIterator[bytes] | None = None
    report: Callable[[], dict[str, Any]] | None = None


class Gateway:
    """Members, a policy that can be changed at any time, and the ledger.

    Args:
        entries: By name.
        policies: By name.
        active: The policy that serves requests for ``skimp``.
        ledger: Where everything is recorded.
        timeout: Seconds that a request may take, streaming included.
        capped: Whether requests without a limit of tokens are given the member's: budgets can only
            hold where there is one.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        policies: Mapping[str, Policy],
        active: str,
        ledger: Ledger,
        *,
        timeout: float = 300.0,
        capped: bool = False,
    ) -> None:
        for name, policy in policies.items():
            if missing := [m for m in policy.members if m not in entries]:
                raise SkimpError(
                    f"policy {name!r} needs members that are not configured: {missing}"
                )
        self.entries = dict(entries)
        self.policies = dict(policies)
        self.ledger = ledger
        self.timeout = timeout
        self.capped = capped
        self.metrics = Metrics()
        self._extractors: dict[str, Extractor] = {}
        self._drifts: dict[str, Drift] = {}
        self.alarms: list[tuple[str, str]] = []
        self.use(active)

    def use(self, name: str) -> None:
        """Serve ``skimp`` with another policy from the next request on."""
        if name not in self.policies:
            raise SkimpError(f"no policy {name!r}; there are {', '.join(self.policies)}")
        self.active = name

    def drift_of(self, policy: Policy) -> Drift | None:
        """The monitors of a policy that made a promise."""
        record = getattr(policy, "record", None)
        if policy.bound is None or not record:
            return None
        if policy.digest not in self._drifts:
            self._drifts[policy.digest] = Drift.of(record)
        return self._drifts[policy.digest]

    async def close(self) -> None:
        """Close members and ledger."""
        for entry in self.entries.values():
            await entry.member.close()
        await asyncio.to_thread(self.ledger.close)

    # -- one request ------------------------------------------------------------------------------

    async def answer(self, query: Query, policy: Policy) -> Answer:
        """Answer a request.

        Raises:
            UnavailableError: No member answered.
                BudgetExceededError: There is not enough money left, and nothing to serve.
            LedgerError: It could not be recorded.
        """
        trip = Trip(query, policy)
        try:
            async with asyncio.timeout(self.timeout):
                return await self._climb(trip)
        except BaseException as error:
            if not trip.finished:
                done = self._finish(trip, _status_of(error))
                if not isinstance(error, asyncio.CancelledError):
                    await done
            if isinstance(error, TimeoutError):
                raise UnavailableError(f"no answer within {self.timeout:g} s") from None
            raise

    async def _climb(self, trip: Trip) -> Answer:
        failure: MemberError | None = None
        while True:
            step = trip.policy.next(trip.query.body, trip.hops)
            if isinstance(step, Serve):
                return await self._serve(trip, step.hop)
            try:
                if step is None:
                    raise UnavailableError("no member answered", failure)
                if step.final and trip.query.stream and step.samples == 1:
                    return await self._stream(trip, step)
                await self._hop(trip, step)
                if step.final and trip.hops[-1].ok:
                    return await self._serve(trip, len(trip.hops) - 1)
            except (UnavailableError, BudgetExceededError):
                best = max(
                    (i for i, h in enumerate(trip.hops) if h.ok),
                    key=lambda i: trip.hops[i].confidence,
                    default=None,
                )
                if best is None:
                    raise
                return await self._serve(trip, best, "degraded")
            except MemberError as error:  # a voter may refuse what a stronger member can do
                failure = error
                if isinstance(step, Call):
                    trip.hops.append(Hop(step.member, (), 0.0, None, trip.cost))
                trip.replies.append(None)

    async def _hop(self, trip: Trip, step: Call) -> None:
        """Ask a member for its samples, or those it names as fallback."""
        error: MemberError | None = None
        for name in (step.member, *self.entries[step.member].fallback):
            entry = self.entries[name]
            results = await asyncio.gather(
                *(self._call(trip, entry, *call) for call in _calls(trip.query, step, entry)),
                return_exceptions=True,
            )
            replies = [r for r in results if isinstance(r, Reply)]
            broke = None
            for result in results:
                if isinstance(result, MemberError):
                    error = result
                elif isinstance(result, BudgetExceededError):
                    broke = result
                elif isinstance(result, BaseException):
                    raise result
            if replies:
                self._count(trip, step, name, replies)
                return
            if broke is not None:
                raise broke
            trip.route.append({"member": name, "status": error.kind if error else "error"})
            if error is not None and not error.passing:
                raise error
        raise error or MemberError("error", "no reply")

    def _count(self, trip: Trip, step: Call, name: str, replies: Sequence[Reply]) -> None:
        """Count the votes of a hop."""
        find = self._extractor(trip.policy.extractor)
        choices = [(r, i) for r in replies for i in range(len(r.body["choices"]))]
        answers: list[str | None] = [
            answer_of(choice_message(r.body["choices"][i]), find) for r, i in choices
        ]
        padded = answers + [None] * (step.samples - len(answers))  # a failed sample does not agree
        mode, confidence = vote(padded)
        at = answers.index(mode) if mode is not None else 0
        text = json.dumps(choice_message(choices[at][0].body["choices"][choices[at][1]]))
        asked = step.samples > 1 or not step.final
        trip.hops.append(Hop(step.member, tuple(padded), confidence, text, trip.cost))
        trip.replies.append(choices[at])
        usages = [r.usage or {} for r in replies]
        trip.route.append(
            {
                "member": name,
                "status": "ok",
                "samples": step.samples,
                "confidence": confidence if asked else None,
                "prompt_tokens": sum(u.get("prompt_tokens", 0) for u in usages),
                "completion_tokens": sum(u.get("completion_tokens", 0) for u in usages),
                "cost": sum(self.entries[name].price.of_usage(u) for u in usages),
            }
        )

    async def _serve(self, trip: Trip, hop: int, status: str = "ok") -> Answer:
        kept = trip.replies[hop]
        if kept is None:
            raise UnavailableError("the policy chose a hop that failed")
        reply, at = kept
        trip.served, trip.confidence = trip.hops[hop].member, trip.hops[hop].confidence
        await self._finish(trip, status)
        choice = {**reply.body["choices"][at], "index": 0}
        several = isinstance(n := trip.query.body.get("n"), int) and n > 1
        choices = reply.body["choices"] if several else [choice]
        body = {**reply.body, "choices": choices, "skimp": trip.report()}
        if not trip.query.stream:
            return Answer(trip.headers(), body)
        return Answer(trip.headers(), stream=_as_stream(body, trip), report=trip.report)

    async def _stream(self, trip: Trip, step: Call) -> Answer:
        """Stream the final member, or its fallbacks as long as nothing was sent."""
        error: MemberError | None = None
        for name in (step.member, *self.entries[step.member].fallback):
            entry = self.entries[name]
            for tries in range(entry.retries + 1):
                try:
                    opened = await self._open(trip, entry, _request(trip.query, step))
                except MemberError as failed:
                    error = failed
                    if failed.transient and tries < entry.retries:
                        await _pause(failed, tries)
                        continue
                    break
                trip.served = step.member
                headers = trip.headers() | {"x-skimp-route": opened.path}
                return Answer(headers, stream=opened.relay(), report=trip.report)
            trip.route.append({"member": name, "status": error.kind if error else "error"})
            if error is not None and not error.passing:
                raise error
        raise error or MemberError("error", "no reply")

    async def _open(self, trip: Trip, entry: Entry, request: dict[str, Any]) -> "_Stream":
        request = self._capped(entry, request)
        held = self._reservation(trip, entry, request, 1)
        await self._reserve(held)
        stream = _Stream(self, trip, entry, held, request)
        await stream.open()
        return stream

    async def _call(self, trip: Trip, entry: Entry, request: dict[str, Any], n: int) -> Reply:
        """One call, tried again where that may help; every attempt is in the ledger."""
        request = self._capped(entry, request)
        if n > 1:
            request["n"] = n
        tries = 0
        while True:
            held = self._reservation(trip, entry, request, n)
            await self._reserve(held)
            begun = time.perf_counter()
            try:
                reply = await entry.member.complete(trip.query.kind, request)
            except MemberError as error:
                self._settle(trip, entry, held, error.kind, begun, request, error=error)
                if not error.transient or tries >= entry.retries:
                    raise
                await _pause(error, tries)
                tries += 1
                continue
            except BaseException as error:
                kind = "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
                self._settle(trip, entry, held, kind, begun, request)
                raise
            text = json.dumps([choice_message(c).get("content") for c in reply.body["choices"]])
            self._settle(trip, entry, held, "ok", begun, request, reply.usage, len(text) // 4)
            return reply

    # -- money ------------------------------------------------------------------------------------

    def _capped(self, entry: Entry, request: dict[str, Any]) -> dict[str, Any]:
        limits = ("max_tokens", "max_completion_tokens")
        if self.capped and not any(isinstance(request.get(x), int) for x in limits):
            return {**request, "max_tokens": entry.max_tokens}
        return dict(request)

    def _reservation(
        self, trip: Trip, entry: Entry, request: Mapping[str, Any], n: int
    ) -> Reservation:
        n = max(n, request["n"] if isinstance(request.get("n"), int) else 1)
        limit = request.get("max_completion_tokens") or request.get("max_tokens")
        out = limit if isinstance(limit, int) and limit > 0 else entry.max_tokens
        amount = entry.price.of(most_prompt_tokens(request), out * n)
        now = time.time()
        return Reservation(
            uuid.uuid4().hex,
            trip.id,
            entry.name,
            trip.query.budgets,
            amount,
            now,
            now + self.timeout + 60,
        )

    async def _reserve(self, held: Reservation) -> None:
        try:
            await self.ledger.reserve(held)
        except asyncio.CancelledError:
            self.ledger.release(held)
            raise

    def _settle(
        self,
        trip: Trip,
        entry: Entry,
        held: Reservation,
        status: str,
        begun: float,
        request: Mapping[str, Any],
        usage: Mapping[str, Any] | None = None,
        delivered: int = 0,
        *,
        error: MemberError | None = None,
    ) -> None:
        """Put an attempt into the ledger; the request's own row, later, is what is waited for.

        What the member reported is its cost. Where it reported nothing, an estimate: of the prompt
        and what was delivered, unless it refused, for which nobody charges.
        """
        reported = usage is not None
        if usage is not None:
            prompt, out = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        elif error is not None and (error.status is not None or error.kind == "connection"):
            prompt = out = 0
        else:
            prompt, out = most_prompt_tokens(request) // 4, delivered
        cost = entry.price.of(prompt, out)
        attempt = Attempt(
            id=held.id,
            request_id=trip.id,
            at=held.at,
            member=entry.name,
            status=status,
            prompt_tokens=prompt,
            completion_tokens=out,
            reported=reported,
            input_price=entry.price.input,
            output_price=entry.price.output,
            cost=cost if reported else 0.0,
            estimate=0.0 if reported else cost,
            seconds=time.perf_counter() - begun,
        )
        trip.cost += attempt.cost
        trip.estimate += attempt.estimate
        self.metrics.attempt(attempt)
        self.ledger.settle(held, attempt)

    def _finish(self, trip: Trip, status: str) -> "asyncio.Future[None]":
        """Record the request; once this is written, so are all its attempts."""
        trip.finished = True
        bound = trip.policy.bound
        row = Request(
            id=trip.id,
            at=trip.at,
            caller=trip.query.caller,
            policy=trip.policy.name,
            digest=trip.policy.digest,
            route=trip.path,
            served=trip.served,
            status=status,
            confidence=trip.confidence,
            cost=trip.cost,
            estimate=trip.estimate,
            bound=None if bound is None else bound[0],
            seconds=time.perf_counter() - trip.begun,
        )
        drift = self.drift_of(trip.policy)
        if drift is not None and status in ("ok", "degraded"):
            raised = drift.add(trip.cost + trip.estimate)
            self.alarms += [(trip.policy.name, text) for text in raised]
        self.metrics.request(row, drift)
        return self.ledger.finish(row)

    def _extractor(self, name: str) -> Extractor:
        if name not in self._extractors:
            self._extractors[name] = extractor(name)
        return self._extractors[name]


class _Stream:
    """A member's stream on its way to the caller, and what it has cost so far."""

    def __init__(
        self, gateway: Gateway, trip: Trip, entry: Entry, held: Reservation, request: dict[str, Any]
    ) -> None:
        self.gateway, self.trip, self.entry = gateway, trip, entry
        self.held, self.request = held, request
        self.begun = time.perf_counter()
        self.chunks = entry.member.stream(trip.query.kind, request)
        self.first: Chunk | None = None
        self.usage: dict[str, Any] | None = None
        self.deltas = 0

    @property
    def path(self) -> str:
        """The route with this member at its end."""
        return ">".join(x for x in (self.trip.path, self.entry.name) if x)

    async def open(self) -> None:
        """Wait for the first chunk, so that a failure can still go elsewhere."""
        try:
            self.first = await anext(self.chunks, None)
            if self.first is None:
                raise MemberError("broken", "the stream was empty")
        except BaseException as error:
            await _close(self.chunks)
            member_error = error if isinstance(error, MemberError) else None
            kind = member_error.kind if member_error else "cancelled"
            self._settle(kind, member_error)
            raise

    async def relay(self) -> AsyncIterator[bytes]:
        """The data of the caller's events, without ``[DONE]``, which follows the last of them."""
        trip, status, error = self.trip, "ok", None
        try:
            left = self.gateway.timeout - (time.perf_counter() - trip.begun)
            deadline = asyncio.get_running_loop().time() + max(left, 0.1)
            chunk = self.first
            while chunk is not None:
                if data := self._look(chunk):
                    yield data
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(self.chunks, None)
        except MemberError as failed:
            status, error = failed.kind, failed
        except TimeoutError:
            status, error = "timeout", MemberError("timeout", "the request took too long")
        except BaseException:
            self._record("cancelled", "disconnected", None)
            raise
        finally:
            await _close(self.chunks)
        await self._record(status, "ok" if error is None else "broken", error)
        if error is not None:
            yield _error_data(error.message, error.kind)

    def _look(self, chunk: Chunk) -> bytes | None:
        """Take note of a chunk; what of it the caller should see."""
        usage = usage_in(chunk.data)
        if usage is not None:
            self.usage = usage
        choices = chunk.data.get("choices")
        if not isinstance(choices, list):
            return chunk.raw
        self.deltas += sum(1 for c in choices if isinstance(c, dict) and _says_something(c))
        if not choices and "usage" in chunk.data and not self.trip.query.wants_usage:
            return None
        return chunk.raw

    def _settle(self, kind: str, error: MemberError | None) -> None:
        self.gateway._settle(
            self.trip,
            self.entry,
            self.held,
            kind,
            self.begun,
            self.request,
            self.usage,
            self.deltas,
            error=error if self.deltas == 0 else None,
        )

    def _record(self, kind: str, status: str, error: MemberError | None) -> "asyncio.Future[None]":
        """Settle the attempt and finish the request."""
        self._settle(kind, error)
        usage = self.usage or {}
        self.trip.route.append(
            {
                "member": self.entry.name,
                "status": kind,
                "samples": 1,
                "confidence": None,
                "prompt_tokens": usage.get("prompt_tokens", 0),
                "completion_tokens": usage.get("completion_tokens", self.deltas),
                "cost": self.entry.price.of_usage(usage),
            }
        )
        return self.gateway._finish(self.trip, status)


def most_prompt_tokens(request: Mapping[str, Any]) -> int:
    """No fewer tokens than the prompt can have: a token is a byte at least, and images are few."""
    return 64 + sum(_bytes(request.get(k)) for k in ("messages", "prompt", "tools", "functions"))


def _bytes(value: Any) -> int:
    if isinstance(value, str):
        return IMAGE_TOKENS if value.startswith("data:") else len(value.encode()) + 4
    if isinstance(value, dict):
        return sum(len(str(k)) + _bytes(v) for k, v in value.items()) + 4
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return 8


def _request(query: Query, step: Call) -> dict[str, Any]:
    return {**query.body, **step.change}


def _calls(query: Query, step: Call, entry: Entry) -> list[tuple[dict[str, Any], int]]:
    """The requests that give a hop its samples, and how many each gives."""
    request = _request(query, step)
    if step.samples == 1:
        return [(request, 1)]
    request["temperature"] = entry.temperature
    if entry.member.batches:
        return [(request, step.samples)]
    seed = request.get("seed")
    if not isinstance(seed, int):
        return [(request, 1)] * step.samples
    return [({**request, "seed": seed + i}, 1) for i in range(step.samples)]


async def _pause(error: MemberError, tries: int) -> None:
    wait = error.retry_after if error.retry_after is not None else 0.1 * 2**tries
    await asyncio.sleep(min(max(wait, 0.0), 2.0) * random.uniform(0.5, 1.0))


async def _close(chunks: AsyncIterator[Chunk]) -> None:
    close = getattr(chunks, "aclose", None)
    if close is not None:
        await close()


def _says_something(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return bool(delta.get("content") or delta.get("tool_calls") or delta.get("reasoning"))
    return bool(choice.get("text"))


def _status_of(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "disconnected"
    return "refused" if isinstance(error, BudgetExceededError) else "failed"


def _error_data(message: str, kind: str) -> bytes:
    return json.dumps(
        {"error": {"message": message, "type": "member_error", "code": kind}}
    ).encode()


async def _as_stream(body: dict[str, Any], trip: Trip) -> AsyncIterator[bytes]:
    """A finished answer in chunks."""
    chat = trip.query.kind == "chat/completions"
    keep = {k: body[k] for k in ("id", "created", "model", "system_fingerprint") if k in body}
    head: dict[str, Any] = keep | {"object": "chat.completion.chunk" if chat else "text_completion"}

    def chunk(**choice: Any) -> bytes:
        return json.dumps({**head, "choices": [{"index": 0, **choice}]}).encode()

    choice = body["choices"][0]
    if chat:
        message = dict(choice_message(choice))
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{"index": i, **c} for i, c in enumerate(calls)]
        yield chunk(delta=message, finish_reason=None)
        yield chunk(delta={}, finish_reason=choice.get("finish_reason"))
    else:
        yield chunk(text=choice.get("text"), finish_reason=choice.get("finish_reason"))
    if trip.query.wants_usage:
        yield json.dumps({**head, "choices": [], "usage": body.get("usage")}).encode()
