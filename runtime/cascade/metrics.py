"""Counters for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .drift import Drift
from .rows import Attempt, Request

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """A registry of its own, so that two gateways in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests", "policy", "status")
        self.attempts = self._counter("attempts", "Calls of members", "member", "status")
        self.tokens = self._counter("tokens", "Tokens", "member", "kind")
        self.dollars = self._counter("cost_dollars", "Cost reported by members", "member")
        self.estimates = self._counter("estimated_dollars", "Cost not reported", "member")
        self.alarms = self._counter("drift_alarms", "Alarms raised", "policy")
        self.seconds = Histogram(
            "skimp_request_seconds",
            "Seconds per request",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = self._gauge("in_flight", "Requests under way")
        self.exceedance = self._gauge("exceedance", "Share of queries over the bound", "policy")
        self.evidence = self._gauge("drift_evidence", "Bets against the promise", "policy", "test")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"skimp_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"skimp_{name}", text, labels, registry=self.registry)

    def attempt(self, a: Attempt) -> None:
        """Count a call."""
        self.attempts.labels(a.member, a.status).inc()
        self.tokens.labels(a.member, "prompt").inc(a.prompt_tokens)
        self.tokens.labels(a.member, "completion").inc(a.completion_tokens)
        self.dollars.labels(a.member).inc(a.cost)
        self.estimates.labels(a.member).inc(a.estimate)

    def request(self, r: Request, drift: Drift | None) -> None:
        """Count a request."""
        self.requests.labels(r.policy, r.status).inc()
        self.seconds.observe(r.seconds)
        if drift is not None:
            self.exceedance.labels(r.policy).set(drift.exceedance.rate)
            self.evidence.labels(r.policy, "exceedance").set(drift.exceedance.evidence)
            self.evidence.labels(r.policy, "exchangeability").set(drift.exchangeability.evidence)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
