"""The database under the ledger: SQLite or PostgreSQL."""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError

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
        connection.exec_driver_sql(
            "BEGIN IMMEDIATE"
        )  # two processes must not both read, then write

    return engine


def reading(engine: Engine) -> Engine:
    """An engine that takes no write lock."""
    if engine.dialect.name == "sqlite":
        args = {"timeout": 30, "check_same_thread": False}
        return sa.create_engine(engine.url, connect_args=args)
    return engine


def passing(error: Exception) -> bool:
    """Whether the database may be back in a moment: it restarts, or is locked."""
    if not isinstance(error, OperationalError):
        return False
    text = str(error.orig)
    return "sqlite" not in type(error.orig).__module__ or "locked" in text or "busy" in text


def first_line(error: Exception) -> str:
    """The first line of a database error, which holds no parameters."""
    return str(getattr(error, "orig", None) or error).splitlines()[0][:200]
