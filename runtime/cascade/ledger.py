"""Every attempt and every request, on disk before the answer leaves; budgets that hold.

One thread writes. What arrives while it commits goes into the next transaction, so a busy server
commits seldom, and an idle one at once. Money is reserved before a call and settled after it: what
has neither been settled nor released when its time is over (the process died) becomes an attempt
``lost``, at the reserved amount.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from .database import connect, first_line, passing, reading, transaction
from .rows import Attempt, LedgerError, Request, Reservation, meta
from .transaction import Books, Op, apply


class Ledger:
    """The ledger.

    Args:
        url: Of SQLAlchemy: ``sqlite:///file.db`` or ``postgresql+psycopg://...``.

    Raises:
        LedgerError: It cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            self.engine = connect(url)
            self.reader = reading(self.engine)
            meta.create_all(self.engine)
        except (SQLAlchemyError, ImportError) as error:
            raise LedgerError(f"the ledger cannot be opened: {first_line(error)}") from error
        self._queue: queue.SimpleQueue[Op | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="skimp-ledger", daemon=True)
        self._thread.start()
        self._stopping = threading.Event()
        if self.engine.dialect.name == "sqlite":
            threading.Thread(target=self._tidy, name="skimp-checkpoint", daemon=True).start()

    # -- called from the event loop ---------------------------------------------------------------

    def reserve(self, reservation: Reservation) -> "asyncio.Future[None]":
        """Set money aside; awaiting it raises BudgetExceededError if there is not enough."""
        return self._put("reserve", reservation)

    def settle(self, reservation: Reservation, attempt: Attempt) -> "asyncio.Future[None]":
        """Record an attempt and give back what its reservation held."""
        return self._put("settle", (reservation, attempt))

    def release(self, reservation: Reservation) -> "asyncio.Future[None]":
        """Give back a reservation that was never used, or never made."""
        return self._put("release", reservation)

    def finish(self, request: Request) -> "asyncio.Future[None]":
        """Record a request."""
        return self._put("finish", request)

    def sweep(self) -> "asyncio.Future[None]":
        """Turn reservations whose time is over into attempts that were lost."""
        return self._put("sweep", time.time())

    def _put(self, kind: str, row: Any) -> "asyncio.Future[None]":
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(_seen)
        self._queue.put(Op(kind, row, done))
        return done

    def close(self) -> None:
        """Write what is waiting, and stop."""
        self._stopping.set()
        self._queue.put(None)
        self._thread.join(timeout=30)
        self.engine.dispose()
        self.reader.dispose()

    def _tidy(self) -> None:
        """Move SQLite's log into the database every so often, which no request should wait for."""
        while not self._stopping.wait(2.0):
            try:
                with self.reader.connect() as connection:
                    connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
            except SQLAlchemyError:
                continue  # the next one will do

    # -- the thread -------------------------------------------------------------------------------

    def _write(self) -> None:
        stop = False
        while not stop:
            ops: list[Op] = []
            op = self._queue.get()
            while True:
                if op is None:
                    stop = True
                    break
                ops.append(op)
                if len(ops) >= 500:
                    break
                try:
                    op = self._queue.get_nowait()
                except queue.Empty:
                    break
            if ops:
                self._commit(ops)

    def _commit(self, ops: list[Op]) -> None:
        for tries in range(8):
            try:
                with transaction(self.engine) as cursor:
                    apply(Books(cursor, self.engine.dialect.name == "postgresql"), ops)
                break
            except Exception as error:  # the thread must outlive whatever one batch does
                if tries < 7 and passing(error):
                    time.sleep(min(0.05 * 2**tries, 1.0))
                    continue
                if len(ops) > 1 and not passing(error):  # one row cannot be written: the others can
                    for op in ops:
                        self._commit([op])
                    return
                _fail(ops, error)
                break
        by_loop: dict[asyncio.AbstractEventLoop, list[Op]] = {}
        for op in ops:
            if op.done is not None:
                by_loop.setdefault(op.done.get_loop(), []).append(op)
        for loop, done in by_loop.items():
            try:
                loop.call_soon_threadsafe(_resolve, done)
            except RuntimeError:  # the loop is closed: nobody waits any more
                continue


def _fail(ops: Sequence[Op], error: Exception) -> None:
    failure = LedgerError(f"the ledger cannot be written: {first_line(error)}")
    for op in ops:
        op.error = failure


def _resolve(ops: Sequence[Op]) -> None:
    for op in ops:
        if op.done is None or op.done.done():
            continue
        if op.error is not None:
            op.done.set_exception(op.error)
        else:
            op.done.set_result(None)


def _seen(done: "asyncio.Future[None]") -> None:
    """Mark an error as looked at: not every settlement is awaited."""
    if not done.cancelled():
        done.exception()
