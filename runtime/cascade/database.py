"""The database under the ledger: SQLite or PostgreSQL."""

import contextlib
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from .rows import LedgerError


def connect(url: str) -> Engine:
    """An engine whose transactions may write.

    Raises:
        LedgerError: It is neither SQLite nor PostgreSQL.
    """
    parsed = sa.make_url(url)
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise LedgerError(f"the ledger is sqlite or postgresql, not {parsed.get_backend_name()}")
    if parsed.get_backend_name() == "postgresql":
        return sa.create_engine(parsed, pool_pre_ping=True, pool_size=2)
    engine = sa.create_engine(parsed, connect_args={"timeout": 30, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the driver must not begin transactions of its own
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            "busy_timeout=30000",
            "wal_autocheckpoint=0",  # see _tidy
        ):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(_BEGIN)

    return engine


_BEGIN = "BEGIN IMMEDIATE"  # two processes must not both read, then write


@contextlib.contextmanager
def transaction(engine: Engine) -> Iterator[Any]:
    """A cursor of the driver in a transaction that may write, committed if nothing is raised."""
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        if engine.dialect.name == "sqlite":
            cursor.execute(_BEGIN)
        yield cursor
        connection.commit()
    finally:
        connection.close()  # back to the pool, which rolls back what was not committed


def reading(engine: Engine) -> Engine:
    """An engine that takes no write lock."""
    if engine.dialect.name == "sqlite":
        args = {"timeout": 30, "check_same_thread": False}
        return sa.create_engine(engine.url, connect_args=args)
    return engine


def passing(error: Exception) -> bool:
    """Whether the database may be back in a moment: it restarts, or is locked."""
    cause = getattr(error, "orig", error)  # SQLAlchemy's, or the driver's own
    kinds = {(c.__module__.partition(".")[0], c.__name__) for c in type(cause).__mro__}
    text = str(cause)
    if ("sqlite3", "OperationalError") in kinds:
        return "locked" in text or "busy" in text
    return ("psycopg", "OperationalError") in kinds


def first_line(error: Exception) -> str:
    """The first line of a database error, which holds no parameters."""
    return str(getattr(error, "orig", None) or error).splitlines()[0][:200]
