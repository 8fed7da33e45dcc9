"""From a request to an answer: ask the policy, call members, account for every call.

Knows nothing of HTTP servers; :mod:`skimp.runtime.cascade.server` does. Only an answer that is
served whatever it says may stream; votes are kept back until they are counted.
"""

import asyncio
import json
import time
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ...ir.errors import SkimpError
from .accounts import Accounts
from .extract import Extractor, answer_of, extractor, vote
from .ledger import Ledger
from .member import MemberError, Reply, choice_message, pause
from .policy import Call, Hop, Policy, Serve
from .relay import Relay, in_chunks
from .rows import BudgetExceededError
from .trip import Answer, Entry, Kept, Query, Trip, UnavailableError, header_text


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
        members_exist(policies, entries)
        self.entries = dict(entries)
        self.policies = dict(policies)
        self.accounts = Accounts(ledger, timeout=timeout, capped=capped)
        self.ledger, self.metrics = ledger, self.accounts.metrics
        self.timeout = timeout
        self._extractors: dict[str, Extractor] = {}
        self.use(active)

    def use(self, name: str) -> None:
        """Serve ``skimp`` with another policy from the next request on."""
        if name not in self.policies:
            raise SkimpError(f"no policy {name!r}; there are {', '.join(self.policies)}")
        self.active = name

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
            try:
                async with asyncio.timeout(self.timeout):
                    return await self._climb(trip)
            except TimeoutError:  # votes that are there already need no more time
                best = trip.best()
                if trip.finished or best is None:
                    raise
                return await self._serve(trip, best, "degraded")
        except BaseException as error:
            if not trip.finished:
                done = self.accounts.finish(trip, _status_of(error))
                if not isinstance(error, asyncio.CancelledError):
                    await done
            if isinstance(error, TimeoutError):
                raise UnavailableError(f"no answer within {self.timeout:g} s") from None
            raise

    async def _climb(self, trip: Trip) -> Answer:
        failure: MemberError | None = None
        while True:
            step = await self._next(trip)
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
                best = trip.best()
                if best is None:
                    raise
                return await self._serve(trip, best, "degraded")
            except MemberError as error:  # a voter may refuse what a stronger member can do
                failure = error
                if isinstance(step, Call):
                    trip.hops.append(Hop(step.member, (), 0.0, None, trip.cost, step.check))
                trip.replies.append(None)

    async def _next(self, trip: Trip) -> Call | Serve | None:
        """Ask the policy; in a thread if it thinks for more than a moment."""
        if getattr(trip.policy, "blocking", False):
            return await asyncio.to_thread(trip.policy.next, trip.query.body, tuple(trip.hops))
        return trip.policy.next(trip.query.body, trip.hops)

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
        del choices[step.samples :]  # a member may send more than it was asked for
        answers: list[str | None] = [
            answer_of(choice_message(r.body["choices"][i]), find) for r, i in choices
        ]
        padded = answers + [None] * (step.samples - len(answers))  # a failed sample does not agree
        mode, confidence = vote(padded)
        at = answers.index(mode) if mode is not None else 0
        text = json.dumps(choice_message(choices[at][0].body["choices"][choices[at][1]]))
        asked = step.samples > 1 or not (step.final or step.check)
        hop = Hop(step.member, tuple(padded), confidence, text, trip.cost, step.check)
        trip.hops.append(hop)
        trip.replies.append(Kept(*choices[at], name))
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
        trip.served, trip.confidence = kept.member, trip.hops[hop].confidence
        await self.accounts.finish(trip, status)
        choices = kept.reply.body["choices"]
        if not trip.query.several:
            choices = [{**choices[kept.choice], "index": 0}]
        body = {**kept.reply.body, "choices": choices, "skimp": trip.report()}
        if not trip.query.stream:
            return Answer(trip.headers(), body)
        return Answer(trip.headers(), stream=in_chunks(body, trip), report=trip.report)

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
                        await pause(failed, tries)
                        continue
                    break
                trip.served = name
                headers = trip.headers() | {"x-skimp-route": header_text(opened.path)}
                return Answer(headers, stream=opened.relay(), report=trip.report)
            trip.route.append({"member": name, "status": error.kind if error else "error"})
            if error is not None and not error.passing:
                raise error
        raise error or MemberError("error", "no reply")

    async def _open(self, trip: Trip, entry: Entry, request: dict[str, Any]) -> Relay:
        request = self.accounts.limited(entry, request)
        held = await self.accounts.reserve(trip, entry, request, 1)
        stream = Relay(self.accounts, trip, entry, held, request)
        await stream.open()
        return stream

    async def _call(self, trip: Trip, entry: Entry, request: dict[str, Any], n: int) -> Reply:
        """One call, tried again where that may help; every attempt is in the ledger."""
        request = self.accounts.limited(entry, request)
        if n > 1:
            request["n"] = n
        tries = 0
        while True:
            held = await self.accounts.reserve(trip, entry, request, n)
            begun = time.perf_counter()
            try:
                reply = await entry.member.complete(trip.query.kind, request)
            except MemberError as error:
                self.accounts.settle(trip, entry, held, error.kind, begun, request, error=error)
                if not error.transient or tries >= entry.retries:
                    raise
                await pause(error, tries)
                tries += 1
                continue
            except BaseException as error:
                kind = "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
                self.accounts.settle(trip, entry, held, kind, begun, request)
                raise
            text = json.dumps([choice_message(c).get("content") for c in reply.body["choices"]])
            self.accounts.settle(
                trip, entry, held, "ok", begun, request, reply.usage, len(text) // 4
            )
            return reply

    def _extractor(self, name: str) -> Extractor:
        if name not in self._extractors:
            self._extractors[name] = extractor(name)
        return self._extractors[name]


def members_exist(policies: Mapping[str, Policy], among: Container[str]) -> None:
    """Check that policies ask for nobody else.

    Raises:
        SkimpError: One does; says which.
    """
    for name, policy in policies.items():
        if missing := [m for m in policy.members if m not in among]:
            raise SkimpError(f"policy {name!r} needs members that are not configured: {missing}")


def _request(query: Query, step: Call) -> dict[str, Any]:
    gone = [k for k, v in step.change.items() if v is None]
    return {k: v for k, v in {**query.body, **step.change}.items() if k not in gone}


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


def _status_of(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "disconnected"
    return "refused" if isinstance(error, BudgetExceededError) else "failed"
