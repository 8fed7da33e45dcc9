"""What serving a model costs, and where it is cheapest.

A machine has a price per hour; a load sweep gives the seconds that requests take at each
concurrency; both together give US dollars per request and per token, average and marginal, and the
zone in which concurrency is worth while. After "The economics of AI inference", arXiv 2510.26136;
its quantities as testable formulas are this module's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import MALFORMED, SkimpError
from .cascade.price import Price

HOURS_PER_YEAR = 8760
VERSION = 2


class EconomicsError(SkimpError):
    """Measurements that no cost can be computed from."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that is owned.

    Attributes:
        price: Purchase price, US dollars.
        years: Until it is written off.
        utilisation: Share of the time that it works, over (0, 1].
        kw: Power at work, kilowatts.
        pue: Power usage effectiveness of where it stands, 1 or more.
        kwh: US dollars per kilowatt-hour.
        maintenance: Per year, as a share of the purchase price.
    """

    price: float
    years: float = 4.0
    utilisation: float = 0.5
    kw: float = 0.4
    pue: float = 1.3
    kwh: float = 0.12
    maintenance: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what no machine is."""
        if not 0 < self.utilisation <= 1 or self.years <= 0 or self.pue < 1:
            raise EconomicsError(
                f"utilisation {self.utilisation} in (0, 1], years {self.years} > 0, "
                f"PUE {self.pue} >= 1"
            )
        if min(self.price, self.kw, self.kwh, self.maintenance) < 0:
            raise EconomicsError("a price, power or rate below 0")

    def terms(self) -> dict[str, float]:
        """US dollars per hour at work: P / (Y 8760 u), kW PUE E and P m / 8760."""
        return {
            "depreciation": self.price / (self.years * HOURS_PER_YEAR * self.utilisation),
            "power": self.kw * self.pue * self.kwh,
            "maintenance": self.price * self.maintenance / HOURS_PER_YEAR,
        }

    @property
    def hourly(self) -> float:
        """US dollars per hour."""
        return sum(self.terms().values())


def cost_of(seconds: float, hourly: float) -> float:
    """US dollars of a machine for so many seconds."""
    return hourly * seconds / 3600


def seconds_for(dollars: float, hourly: float) -> float:
    """The inverse: seconds of a machine for so many US dollars."""
    return 3600 * dollars / hourly


@dataclass(frozen=True, slots=True)
class Level:
    """A load sweep at one concurrency.

    Attributes:
        concurrency: Requests under way at a time, n.
        ttft: Seconds to the first token, per request.
        seconds: Seconds to the last token, per request.
        prompt_tokens: Of all requests together; ``completion_tokens`` alike.
        wall: Seconds that the level took.
        failed: Requests that failed, and count nowhere else.
    """

    concurrency: int
    ttft: tuple[float, ...]
    seconds: tuple[float, ...]
    prompt_tokens: int
    completion_tokens: int
    wall: float
    failed: int = 0

    @property
    def requests(self) -> int:
        """How many were answered."""
        return len(self.seconds)

    @property
    def rate(self) -> float:
        """Requests per second, lambda."""
        return self.requests / self.wall


def interval(
    values: Sequence[float], *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean (percentiles)."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), float(x.mean())
    means = np.random.default_rng(seed).choice(x, (draws, len(x))).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def curves(levels: Sequence[Level], hourly: float) -> list[dict[str, Any]]:
    """Cost and speed at each concurrency.

    Average cost AC = G T / (3600 N) per request, where T is the wall time of N requests. Elasticity
    e = d ln(lambda) / d ln(n) over the arc from the level before, lambda in requests per second;
    below 1 returns diminish. Marginal cost MC = AC / e, the relation of the two where output grows
    by concurrency alone: more than AC as soon as returns diminish; none where output shrinks.

    Args:
        levels: In any order.
        hourly: US dollars per hour, G.
    """
    rows: list[dict[str, Any]] = []
    before: Level | None = None
    for level in sorted(levels, key=lambda v: v.concurrency):
        if not level.requests or level.wall <= 0:
            raise EconomicsError(f"concurrency {level.concurrency}: no request was answered")
        n = level.concurrency
        low, high = interval(level.seconds)
        # a closed loop of n has lambda = n / mean seconds, so its bounds are those of the mean
        row: dict[str, Any] = {
            "concurrency": n,
            "requests": level.requests,
            "failed": level.failed,
            "rate": level.rate,
            "rate_interval": (n / high, n / low),
            "tokens_per_second": level.completion_tokens / level.wall,
            "ttft": float(np.mean(level.ttft)),
            "ttft_interval": interval(level.ttft),
            "seconds": float(np.mean(level.seconds)),
            "seconds_interval": (low, high),
            "average_cost": cost_of(level.wall, hourly) / level.requests,
            "average_cost_interval": (cost_of(low, hourly) / n, cost_of(high, hourly) / n),
            "usd_per_mtok": cost_of(level.wall, hourly) / max(level.completion_tokens, 1) * 1e6,
            "marginal_cost": None,
            "elasticity": None,
        }
        if before is not None:
            row["elasticity"] = float(
                np.log(level.rate / before.rate) / np.log(n / before.concurrency)
            )
            if row["elasticity"] > 0:
                row["marginal_cost"] = row["average_cost"] / row["elasticity"]
        rows.append(row)
        before = level
    return rows


def zone(
    rows: Sequence[Mapping[str, Any]], *, slo: float = float("inf"), slack: float = 0.1
) -> list[int]:
    """Where serving is cost-effective: AC(n) <= (1 + slack) min AC, and TTFT(n) <= the objective.

    The least is taken where the objective holds; empty where it never does.

    Args:
        rows: What :func:`curves` gave.
        slo: Seconds to the first token.
        slack: Eta, how far above the least is near enough.
    """
    allowed = [r for r in rows if r["ttft"] <= slo]
    if not allowed:
        return []
    most = (1 + slack) * min(r["average_cost"] for r in allowed)
    return [r["concurrency"] for r in allowed if r["average_cost"] <= most]


def token_price(level: Level, hourly: float) -> Price:
    """US dollars per million tokens at a concurrency, so that both parts add up to the machine.

    Each of n requests under way has an n-th of the machine: what passes until the first token is
    paid by the prompt, what follows by the completion.
    """
    if not level.requests or not level.prompt_tokens or not level.completion_tokens:
        raise EconomicsError("no tokens were counted, so they have no price")
    n = level.concurrency
    first = sum(level.ttft)
    rest = sum(level.seconds) - first
    scale = cost_of(1.0, hourly) / n * 1e6
    return Price(scale * first / level.prompt_tokens, scale * rest / level.completion_tokens)


def frontier(
    cost: Sequence[float], quality: Sequence[float], latency: Sequence[float] | None = None
) -> NDArray[np.bool_]:
    """Which points no other dominates: none as cheap, as good and as fast, and better in one. [n].

    Of equal points all are kept.
    """
    columns = [np.asarray(cost, float), -np.asarray(quality, float)]
    if latency is not None:
        columns.append(np.asarray(latency, float))
    x = np.stack(columns, 1)
    no_worse = (x[:, None] <= x[None]).all(-1)
    better = (x[:, None] < x[None]).any(-1)
    kept: NDArray[np.bool_] = np.logical_not((no_worse & better).any(0))
    return kept


def sweep_record(
    source: Mapping[str, Any],
    levels: Sequence[Level],
    hourly: float,
    machine: Machine | None = None,
) -> dict[str, Any]:
    """A sweep as JSON.

    Args:
        source: What was loaded, and how: ``model``, ``url``, ``tau``, ``max_tokens``. Sweeps of
            different sources are not put together unless asked to.
        levels: What was measured.
        hourly: US dollars per hour.
        machine: Where that comes from, if it is owned.
    """
    record: dict[str, Any] = {
        "format": "skimp-sweep",
        "version": VERSION,
        "name": str(source["model"]),
        "source": dict(source),
        "hourly": hourly,
        "machine": None if machine is None else asdict(machine) | {"terms": machine.terms()},
        "levels": [asdict(v) for v in levels],
    }
    if levels and all(v.requests for v in levels):
        record["curves"] = curves(levels, hourly)
    return record


def read_sweep(path: Path) -> tuple[dict[str, Any], list[Level]]:
    """A file of ``skimp economics sweep``.

    Raises:
        EconomicsError: It is missing or something else.
    """
    try:
        record = json.loads(path.read_text())
        if record.get("format") != "skimp-sweep" or record.get("version") != VERSION:
            raise EconomicsError(f"{path} is no sweep of version {VERSION}; measure again")
        levels = [
            Level(**{**row, "ttft": tuple(row["ttft"]), "seconds": tuple(row["seconds"])})
            for row in record["levels"]
        ]
    except (OSError, *MALFORMED) as error:
        raise EconomicsError(f"{path} cannot be read as a sweep: {error}") from error
    return record, levels


def read_points(
    paths: Sequence[Path], quality: Mapping[str, float] | None = None, *, mix: bool = False
) -> list[dict[str, Any]]:
    """The points of a frontier, from lists of models and from sweeps.

    Args:
        paths: Each a JSON list of ``{name, cost, quality, latency (optional)}``, or a sweep, whose
            levels are a point each: US dollars and seconds per request.
        quality: Of swept models, by name.
        mix: Compare sweeps of different models though nothing says how good they are.

    Raises:
        EconomicsError: A file is neither; or sweeps of different sources, without their quality.
    """
    known = quality or {}
    points: list[dict[str, Any]] = []
    swept: dict[str, dict[str, Any]] = {}
    for path in paths:
        found = _points_in(path, known, swept)
        if not found:
            raise EconomicsError(f"{path} holds no points")
        points += found
    if missing := known.keys() - {str(s["model"]) for s in swept.values()}:
        raise EconomicsError(f"quality of {', '.join(missing)}, which no sweep is of")
    judged = ["quality" in p for p in points]
    if all(judged) or (len(swept) == 1 and not any(judged)):
        return points
    told = "; ".join(f"{path}: {_told(source)}" for path, source in swept.items())
    if any(judged):
        raise EconomicsError(f"some points have a quality and some have none; give it for: {told}")
    if not mix and len({json.dumps(s, sort_keys=True) for s in swept.values()}) > 1:
        raise EconomicsError(
            f"these are sweeps of different things ({told}), and the cheaper of two models wins "
            "where nothing says how good they are: give --quality MODEL=VALUE for each, or --mix"
        )
    return points


def _points_in(
    path: Path, known: Mapping[str, float], swept: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    try:
        read = json.loads(path.read_text())
        if isinstance(read, dict):
            record, levels = read_sweep(path)
            swept[str(path)] = record["source"]
            name = str(record["source"]["model"])
            return [
                {
                    "name": f"{name}, n = {row['concurrency']}",
                    "cost": row["average_cost"],
                    "latency": row["seconds"],
                }
                | ({"quality": known[name]} if name in known else {})
                for row in curves(levels, float(record["hourly"]))
            ]
        return [
            {**r, "name": str(r["name"]), "cost": float(r["cost"]), "quality": float(r["quality"])}
            | ({"latency": float(r["latency"])} if "latency" in r else {})
            for r in read
        ]
    except (OSError, *MALFORMED) as error:
        raise EconomicsError(
            f"{path} is neither a sweep nor a list of name, cost and quality: {error!r}"
        ) from error


def _told(source: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in source.items() if v is not None)


def measured_price(path: Path, concurrency: int | None = None) -> Price:
    """The price that a sweep measured, at a concurrency or where a request was cheapest."""
    record, levels = read_sweep(path)
    hourly = float(record["hourly"])
    rows = curves(levels, hourly)
    best = min(rows, key=lambda r: float(r["average_cost"]))["concurrency"]
    wanted = best if concurrency is None else concurrency
    for level in levels:
        if level.concurrency == wanted:
            return token_price(level, hourly)
    have = ", ".join(str(v.concurrency) for v in levels)
    raise EconomicsError(f"{path} has no concurrency {wanted}, only {have}")
