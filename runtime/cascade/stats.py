"""What the ledger says, for the page: spend, routes, cost against the bound."""

import time
from typing import Any

import sqlalchemy as sa

from .ledger import Ledger
from .rows import attempts, budgets, requests

BUCKETS = 48


def summary(ledger: Ledger, hours: float = 24.0, now: float | None = None) -> dict[str, Any]:
    """Totals, routes, members and a time line of the last hours; JSON-serialisable.

    Runs a handful of queries over an index on time; call it off the event loop.
    """
    now = time.time() if now is None else now
    since = now - 3600 * hours
    recent, tried = requests.c.at >= since, attempts.c.at >= since
    count, total = sa.func.count(), sa.func.coalesce(sa.func.sum(requests.c.cost), 0.0)
    guess = sa.func.coalesce(sa.func.sum(requests.c.estimate), 0.0)
    over = sa.func.sum(
        sa.case((requests.c.cost + requests.c.estimate > requests.c.bound, 1), else_=0)
    )
    bounded = sa.func.count(requests.c.bound)
    width = 3600 * hours / BUCKETS
    whole = sa.func.floor if ledger.engine.dialect.name == "postgresql" else lambda x: x
    bucket = sa.cast(whole((requests.c.at - since) / width), sa.Integer)  # PostgreSQL rounds
    with ledger.reader.connect() as c:
        head = c.execute(
            sa.select(
                count,
                total,
                guess,
                over,
                bounded,
                sa.func.avg(requests.c.seconds),
                sa.func.min(requests.c.at),
            ).where(recent)
        ).one()
        routes = c.execute(
            sa.select(requests.c.route, requests.c.status, count, total)
            .where(recent)
            .group_by(requests.c.route, requests.c.status)
            .order_by(count.desc())
            .limit(40)
        ).all()
        members = c.execute(
            sa.select(
                attempts.c.member,
                attempts.c.status,
                count,
                sa.func.sum(attempts.c.cost),
                sa.func.sum(attempts.c.estimate),
                sa.func.sum(attempts.c.prompt_tokens),
                sa.func.sum(attempts.c.completion_tokens),
            )
            .where(tried)
            .group_by(attempts.c.member, attempts.c.status)
            .order_by(attempts.c.member)
        ).all()
        line = c.execute(
            sa.select(bucket.label("b"), count, total, over, bounded)
            .where(recent)
            .group_by("b")
            .order_by("b")
        ).all()
        spending = c.execute(
            sa.select(
                sa.cast(whole((attempts.c.at - since) / width), sa.Integer).label("b"),
                attempts.c.member,
                sa.func.sum(attempts.c.cost),
            )
            .where(tried)
            .group_by("b", attempts.c.member)
        ).all()
        latest = c.execute(
            sa.select(
                requests.c.at,
                requests.c.policy,
                requests.c.route,
                requests.c.status,
                requests.c.cost,
                requests.c.bound,
                requests.c.seconds,
            )
            .order_by(requests.c.at.desc())
            .limit(12)
        ).all()
        books = c.execute(sa.select(budgets).order_by(budgets.c.name)).mappings().all()
    return {
        "at": now,
        "hours": hours,
        "requests": head[0],
        "cost": head[1],
        "estimate": head[2],
        "over": int(head[3] or 0),
        "bounded": head[4],
        "mean_seconds": head[5],
        "first": head[6],
        "routes": [
            dict(zip(("route", "status", "requests", "cost"), r, strict=True)) for r in routes
        ],
        "members": [
            dict(
                zip(
                    (
                        "member",
                        "status",
                        "attempts",
                        "cost",
                        "estimate",
                        "prompt_tokens",
                        "completion_tokens",
                    ),
                    r,
                    strict=True,
                )
            )
            for r in members
        ],
        "line": [
            dict(zip(("bucket", "requests", "cost", "over", "bounded"), r, strict=True))
            for r in line
        ],
        "spending": [dict(zip(("bucket", "member", "cost"), r, strict=True)) for r in spending],
        "buckets": BUCKETS,
        "latest": [
            dict(
                zip(("at", "policy", "route", "status", "cost", "bound", "seconds"), r, strict=True)
            )
            for r in latest
        ],
        "budgets": [dict(b) for b in books],
    }
