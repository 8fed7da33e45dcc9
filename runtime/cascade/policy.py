"""Who answers a query: the one protocol that the server knows, and the policies it ships with.

A policy sees the request and what the members called so far have answered, and says what to do
next. It calls nobody and keeps nothing, so that it can be changed between two requests.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...ir.cost import write_atomically
from ...ir.errors import MALFORMED, ArtefactError
from .bounds import exceedance_ceiling
from .calibrate import SKIP, Chosen, Goal
from .drift import Drift
from .traces import MemberSpec, Table

FORMAT = "skimp-cascade-policy"
ROUTER = "skimp-router-policy"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Hop:
    """What a member answered.

    Attributes:
        member: Its name.
        answers: One per sample; ``None`` where none was found.
        confidence: Share of the samples that agree with the mode.
        text: Of the sample that stands for the mode; ``None`` if the member failed.
        cost: US dollars so far, this hop included.
        check: It is about another hop, a judgment say, and never served.
    """

    member: str
    answers: tuple[str | None, ...]
    confidence: float
    text: str | None
    cost: float = 0.0
    check: bool = False

    @property
    def ok(self) -> bool:
        """Whether there is anything to serve."""
        return self.text is not None


@dataclass(frozen=True, slots=True)
class Call:
    """Ask a member.

    Attributes:
        member: Its name.
        samples: How many.
        final: Serve what it says whatever that is, so it may stream.
        change: Fields of the request to replace for this call, ``messages`` for example; ``None``
            takes a field out.
        check: What it says is about another hop, and is never served.
    """

    member: str
    samples: int = 1
    final: bool = False
    change: Mapping[str, Any] = field(default_factory=dict)
    check: bool = False


@dataclass(frozen=True, slots=True)
class Serve:
    """Answer with a hop that was taken, by its number."""

    hop: int


class Policy(Protocol):
    """What decides which members answer a request."""

    @property
    def name(self) -> str:
        """Shown in responses, ledger and page."""

    @property
    def digest(self) -> str:
        """What the name stands for exactly; goes into the ledger."""

    @property
    def members(self) -> tuple[str, ...]:
        """Everyone it may call."""

    @property
    def extractor(self) -> str:
        """How answers are found in texts; see :func:`skimp.runtime.cascade.extract.extractor`."""

    @property
    def bound(self) -> tuple[float, float] | None:
        """Budget in US dollars per query, and the share of queries that may exceed it."""

    def next(self, request: Mapping[str, Any], hops: Sequence[Hop]) -> Call | Serve | None:
        """The next step; ``None`` when there is nobody left to ask and nothing was served."""


@dataclass(frozen=True, slots=True)
class Single:
    """Always one member."""

    member: str
    extractor: str = "number"

    @property
    def name(self) -> str:
        """The member's."""
        return self.member

    @property
    def digest(self) -> str:
        """The member's name: there is nothing else."""
        return f"single:{self.member}"

    @property
    def members(self) -> tuple[str, ...]:
        """Only it."""
        return (self.member,)

    @property
    def bound(self) -> tuple[float, float] | None:
        """None is promised."""
        return None

    def next(self, request: Mapping[str, Any], hops: Sequence[Hop]) -> Call | Serve | None:
        """Call it once."""
        return None if hops else Call(self.member, final=True)


class Recorded:
    """What the record of a policy file says, whatever kind of policy it is of."""

    __slots__ = ()
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Of the file it was read from."""
        return str(self.record.get("sha256", "unsaved"))

    @property
    def extractor(self) -> str:
        """What calibration or training used."""
        return str(self.record.get("extractor", "number"))

    @property
    def bound(self) -> tuple[float, float] | None:
        """What was promised of the cost: US dollars, and the share that may cost more."""
        if not math.isfinite(self.record.get("budget", math.inf)):
            return None
        return float(self.record["budget"]), float(self.record["alpha"])


@dataclass(frozen=True, slots=True)
class Cascade(Recorded):
    """Climb the members until one agrees with itself often enough (C3PO).

    Attributes:
        specs: Members and samples, in the order of escalation.
        thresholds: One per member but the last.
        record: The rest of the policy file.
    """

    specs: tuple[MemberSpec, ...]
    thresholds: tuple[float, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    name: str = "cascade"

    def __post_init__(self) -> None:
        """Refuse a threshold too many or too few."""
        if len(self.thresholds) != len(self.specs) - 1:
            raise ArtefactError(
                f"{len(self.specs)} members need {len(self.specs) - 1} thresholds, "
                f"not {len(self.thresholds)}"
            )

    @property
    def members(self) -> tuple[str, ...]:
        """All but those that are skipped."""
        return tuple(s.name for s, t in self._steps() if t < SKIP)

    def _steps(self) -> list[tuple[MemberSpec, float]]:
        return list(zip(self.specs, (*self.thresholds, 0.0), strict=True))

    def next(self, request: Mapping[str, Any], hops: Sequence[Hop]) -> Call | Serve | None:
        """Serve the last hop if it is sure enough, else climb past everyone already asked."""
        steps = [(s, t) for s, t in self._steps() if t < SKIP]
        if hops and hops[-1].ok and hops[-1].confidence >= dict(_by_name(steps))[hops[-1].member]:
            return Serve(len(hops) - 1)
        if len(hops) >= len(steps):
            return None
        spec, threshold = steps[len(hops)]
        return Call(spec.name, spec.samples, final=threshold == 0)


def _by_name(steps: Sequence[tuple[MemberSpec, float]]) -> list[tuple[str, float]]:
    return [(s.name, t) for s, t in steps]


def policy_record(
    table: Table,
    goal: Goal,
    chosen: Chosen,
    extract: str,
    frontier: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """Everything a reviewer needs, as JSON; nothing in it depends on when or where it was made.

    ``frontier`` is what :func:`skimp.runtime.cascade.frontier.cost_frontier` gave, for the page.
    """
    ceiling = goal.alpha
    if goal.mode == "paper":
        ceiling = exceedance_ceiling(chosen.sizes[1], goal.alpha, goal.delta)
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "extractor": extract,
        "members": [
            {"name": m.name, "samples": m.samples}
            | ({"price": {"input": m.price.input, "output": m.price.output}} if m.price else {})
            for m in table.members
        ],
        "thresholds": ["skip" if t == SKIP else t for t in chosen.thresholds],
        "budget": goal.budget,
        "alpha": goal.alpha,
        "mode": goal.mode,
        "delta": goal.delta,
        "control": goal.control if goal.mode == "strict" else None,
        "tolerance": goal.tolerance,
        "split": {"seed": goal.seed, "sizes": list(chosen.sizes)},
        "evidence": {
            "regret": chosen.regret,
            "cost_quantile": chosen.quantile,
            "violations": chosen.violations,
            "policies_compared": chosen.policies,
            "policies_feasible": chosen.feasible,
        },
        "held_out": chosen.held_out,
        "bounds": chosen.bounds,
        "exceedance_ceiling": ceiling,
        "frontier": [dict(p) for p in frontier],
        "calibration_costs": list(_thin(chosen.costs)),
        "traces": table.digest,
        "warnings": list(table.warnings),
    }
    return record | {"sha256": record_hash(record)}


def _thin(costs: Sequence[float], most: int = 1000) -> Sequence[float]:
    """At most so many of the sorted costs, evenly spaced: enough for the drift monitor's ranks."""
    if len(costs) <= most:
        return costs
    return [costs[round(i * (len(costs) - 1) / (most - 1))] for i in range(most)]


def record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a policy's record, its own entry aside."""
    plain = {k: v for k, v in record.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def save_policy(record: Mapping[str, Any], path: Path) -> None:
    """Write a policy file, complete or not at all."""
    write_atomically(path, json.dumps(record, indent=1, sort_keys=True).encode() + b"\n")


def read_record(path: Path) -> dict[str, Any]:
    """The record of a policy file of any kind, its hash checked.

    Raises:
        ArtefactError: It is missing, foreign, of another version, or was changed by hand.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") not in (FORMAT, ROUTER):
        raise ArtefactError(f"{path} is no cascade policy, nor a router's")
    if record.get("version") != VERSION:
        raise ArtefactError(f"{path} has version {record.get('version')}, not {VERSION}")
    if record.get("sha256") != record_hash(record):
        raise ArtefactError(
            f"{path} was changed after calibration or training: its hash does not fit. Make it anew"
        )
    return record


def load_policy(path: Path, name: str = "cascade") -> Policy:
    """Read a policy file, of a cascade or of a router.

    Raises:
        ArtefactError: It is missing, foreign, of another version, or was changed by hand.
    """
    record = read_record(path)
    try:
        if record["format"] == ROUTER:
            from .router import router_of

            policy: Policy = router_of(record, path, name)
        else:
            policy = cascade_of(record, name)
        if policy.bound is not None:
            Drift.of(record)  # what is promised can be watched
    except MALFORMED as error:
        what = f"{type(error).__name__}: {error}"
        raise ArtefactError(f"{path} is not a policy as skimp writes it ({what})") from error
    return policy


def cascade_of(record: Mapping[str, Any], name: str = "cascade") -> Cascade:
    """The policy that a record of :func:`policy_record` describes."""
    return Cascade(
        tuple(MemberSpec(str(m["name"]), int(m["samples"])) for m in record["members"]),
        tuple(SKIP if t == "skip" else float(t) for t in record["thresholds"]),
        record,
        name,
    )
