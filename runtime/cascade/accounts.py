"""What a request costs: reserved before a call, settled after it, recorded and watched."""

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

from .drift import Drift
from .ledger import Ledger
from .member import MemberError
from .metrics import Metrics
from .policy import Policy
from .price import TOKEN_LIMITS, most_prompt_tokens, samples_billed, token_limit
from .rows import Attempt, Request, Reservation
from .trip import Entry, Trip


class Accounts:
    """What every call and every request did, in the ledger, the metrics and the drift monitors.

    Args:
        ledger: Where everything is recorded.
        timeout: Seconds that a request may take; reservations outlive it by a minute.
        capped: Whether requests without a limit of tokens are given the member's: budgets can only
            hold where there is one.
    """

    def __init__(self, ledger: Ledger, *, timeout: float, capped: bool) -> None:
        self.ledger, self.timeout, self.capped = ledger, timeout, capped
        self.metrics = Metrics()
        self.alarms: list[tuple[str, str]] = []
        self._drifts: dict[str, Drift] = {}

    def drift_of(self, policy: Policy) -> Drift | None:
        """The monitors of a policy that made a promise."""
        record = getattr(policy, "record", None)
        if policy.bound is None or not record:
            return None
        if policy.digest not in self._drifts:
            self._drifts[policy.digest] = Drift.of(record)
        return self._drifts[policy.digest]

    def limited(self, entry: Entry, request: Mapping[str, Any]) -> dict[str, Any]:
        """The request, with a limit of tokens if budgets need one."""
        if self.capped and token_limit(request) is None:
            plain = {k: v for k, v in request.items() if k not in TOKEN_LIMITS}
            return {**plain, "max_tokens": entry.max_tokens}
        return dict(request)

    async def reserve(
        self, trip: Trip, entry: Entry, request: Mapping[str, Any], n: int
    ) -> Reservation:
        """Set aside the most that a call for n samples can cost, US dollars.

        Raises:
            BudgetExceededError: There is not that much left.
            LedgerError: It could not be recorded.
        """
        out = token_limit(request) or entry.max_tokens
        amount = entry.price.of(most_prompt_tokens(request), out * samples_billed(request, n))
        now = time.time()
        held = Reservation(
            uuid.uuid4().hex,
            trip.id,
            entry.name,
            trip.query.budgets,
            amount,
            now,
            now + self.timeout + 60,
        )
        try:
            await self.ledger.reserve(held)
        except asyncio.CancelledError:
            self.ledger.release(held)
            raise
        return held

    def settle(
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
        elif error is not None and error.free:
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

    def finish(self, trip: Trip, status: str) -> "asyncio.Future[None]":
        """Record the request; once this is written, so are all its attempts."""
        trip.finished, trip.status = True, status
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
