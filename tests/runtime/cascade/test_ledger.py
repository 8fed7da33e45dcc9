"""The ledger on SQLite and on a real PostgreSQL: budgets, what is lost, and many writers."""

import asyncio
import threading
import time

import pytest
import sqlalchemy as sa
from skimp.runtime.cascade import rows as module
from skimp.runtime.cascade.ledger import Ledger
from skimp.runtime.cascade.rows import (
    Attempt,
    Budget,
    BudgetExceededError,
    LedgerError,
    Request,
    Reservation,
)
from skimp.runtime.cascade.stats import BUCKETS, summary


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """A ledger that is empty."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/l.db"
    return request.getfixturevalue("postgres")


def held(name, amount, *budgets, at=None, expires=60.0):
    at = time.time() if at is None else at
    return Reservation(name, "r", "m", budgets, amount, at, at + expires)


def attempt(name, cost, status="ok", estimate=0.0):
    return Attempt(name, "r", time.time(), "m", status, 1, 1, True, 1.0, 1.0, cost, estimate, 0.1)


def rows(ledger, table):
    with ledger.reader.connect() as connection:
        return [dict(r) for r in connection.execute(sa.select(getattr(module, table))).mappings()]


def test_money_is_reserved_settled_and_given_back(url):
    ledger = Ledger(url)
    total, own = Budget("total", 1.0), Budget("caller:a", 0.5, "day")

    async def work():
        await ledger.reserve(held("1", 0.3, total, own))
        with pytest.raises(BudgetExceededError, match="caller:a"):
            await ledger.reserve(held("2", 0.3, total, own))
        await ledger.release(held("2", 0.3, total, own))  # it never was: nothing changes
        await ledger.settle(held("1", 0.3, total, own), attempt("1", 0.1))
        await ledger.reserve(held("3", 0.4, total, own))
        await ledger.release(held("3", 0.4, total, own))
        await ledger.finish(
            Request("r", time.time(), "a", "p", "d", "m", "m", "ok", 1.0, 0.1, 0.0, None, 0.1)
        )

    asyncio.run(work())
    books = {r["name"].split("@")[0]: r for r in rows(ledger, "budgets")}
    for book in books.values():
        assert book["spent"] == pytest.approx(0.1, abs=1e-15)
        assert book["reserved"] == pytest.approx(0, abs=1e-15)
    assert len(rows(ledger, "attempts")) == 1
    assert rows(ledger, "reservations") == []
    told = summary(ledger)
    assert (told["requests"], told["cost"]) == (1, pytest.approx(0.1))
    ledger.close()


def test_buckets_of_time_are_the_same_everywhere(url):
    """PostgreSQL rounds where SQLite cuts off."""
    ledger, now = Ledger(url), 1_700_000_000.0

    async def work():
        for i, share in enumerate((0.7, 1.2, 47.9)):
            at = now - 3600 + 3600 * share / BUCKETS
            row = Request(str(i), at, "a", "p", "d", "m", "m", "ok", 1.0, 0.1, 0.0, None, 0.1)
            await ledger.finish(row)

    asyncio.run(work())
    assert [r["bucket"] for r in summary(ledger, 1, now)["line"]] == [0, 1, 47]
    ledger.close()


def test_what_a_killed_process_reserved_is_counted_as_spent(url):
    total = Budget("total", 1.0)
    first = Ledger(url)

    async def reserve():
        await first.reserve(held("1", 0.25, total, expires=-1))
        await first.reserve(held("2", 0.5, total, expires=60))

    asyncio.run(reserve())
    first.close()  # as if it had died: nothing was settled
    second = Ledger(url)

    async def after():
        await second.sweep()
        (book,) = rows(second, "budgets")
        assert (book["spent"], book["reserved"]) == (0.25, 0.5)
        (lost,) = rows(second, "attempts")
        assert (lost["status"], lost["estimate"]) == ("lost", 0.25)
        # a settlement that comes late replaces what was counted as lost
        await second.settle(held("1", 0.25, total, expires=-1), attempt("1", 0.1))
        (book,) = rows(second, "budgets")
        assert book["spent"] == pytest.approx(0.1)
        assert book["reserved"] == 0.5
        (only,) = rows(second, "attempts")
        assert (only["status"], only["cost"]) == ("ok", 0.1)

    asyncio.run(after())
    second.close()


def test_two_servers_share_a_budget(url):
    """Both reserve as fast as they can; together they never hold more than there is."""
    ledgers = [Ledger(url), Ledger(url)]
    total, other = Budget("total", 1.0), Budget("caller:b", 10.0)
    granted = []

    def one(which):
        async def work():
            async def ask(i):
                try:
                    names = (total, other) if i % 2 else (other, total)
                    await ledgers[which].reserve(held(f"{which}-{i}", 0.01, *names))
                    granted.append((which, i))
                except BudgetExceededError:
                    pass

            for start in range(0, 120, 20):
                await asyncio.gather(*(ask(i) for i in range(start, start + 20)))

        asyncio.run(work())

    threads = [threading.Thread(target=one, args=(w,)) for w in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(granted) in (99, 100)  # a hundred times 0.01 may add up to a little more than 1
    books = {r["name"]: r for r in rows(ledgers[0], "budgets")}
    assert books["total"]["reserved"] == pytest.approx(0.01 * len(granted))
    assert books["total"]["reserved"] <= 1.0
    for ledger in ledgers:
        ledger.close()


def test_a_ledger_that_cannot_write_says_so(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path}/l.db")
    with ledger.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE requests")
    row = Request("r", 0.0, "a", "p", "d", "m", "m", "ok", 1.0, 0.1, 0.0, None, 0.1)

    async def work():
        good = ledger.reserve(held("1", 0.1))
        bad = ledger.finish(row)
        await good  # what shares a batch with a bad row is written all the same
        with pytest.raises(LedgerError, match="cannot be written"):
            await bad

    asyncio.run(work())
    assert len(rows(ledger, "reservations")) == 1
    ledger.close()
    with pytest.raises(LedgerError, match="sqlite or postgresql"):
        Ledger("mysql://x/y")


def test_budgets_start_afresh():
    day, month = Budget("b", 1.0, "day"), Budget("b", 1.0, "month")
    first, later = 1_700_000_000.0, 1_700_000_000.0 + 86400
    assert day.current(first) != day.current(later)
    assert month.current(first) == month.current(later)
    assert Budget("b", 1.0).current(first) == "b"
