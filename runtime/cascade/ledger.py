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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from ...ir.errors import SkimpError

_meta = sa.MetaData()
_F: sa.Double[float] = sa.Double()
_I = sa.Integer()

requests = sa.Table(
    "requests",
    _meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("at", _F, nullable=False, index=True),
    sa.Column("caller", sa.String(200), nullable=False),
    sa.Column("policy", sa.String(200), nullable=False),
    sa.Column("digest", sa.String(80), nullable=False),
    sa.Column("route", sa.Text, nullable=False),
    sa.Column("served", sa.String(200)),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("confidence", _F),
    sa.Column("cost", _F, nullable=False),
    sa.Column("estimate", _F, nullable=False),
    sa.Column("bound", _F),
    sa.Column("seconds", _F, nullable=False),
)
attempts = sa.Table(
    "attempts",
    _meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("request_id", sa.String(40), nullable=False, index=True),
    sa.Column("at", _F, nullable=False, index=True),
    sa.Column("member", sa.String(200), nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("prompt_tokens", _I, nullable=False),
    sa.Column("completion_tokens", _I, nullable=False),
    sa.Column("reported", sa.Boolean, nullable=False),
    sa.Column("input_price", _F, nullable=False),
    sa.Column("output_price", _F, nullable=False),
    sa.Column("cost", _F, nullable=False),
    sa.Column("estimate", _F, nullable=False),
    sa.Column("seconds", _F, nullable=False),
)
reservations = sa.Table(
    "reservations",
    _meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("request_id", sa.String(40), nullable=False),
    sa.Column("member", sa.String(200), nullable=False),
    sa.Column("budgets", sa.Text, nullable=False),
    sa.Column("amount", _F, nullable=False),
    sa.Column("at", _F, nullable=False),
    sa.Column("expires", _F, nullable=False, index=True),
)
budgets = sa.Table(
    "budgets",
    _meta,
    sa.Column("name", sa.String(240), primary_key=True),
    sa.Column("usd", _F, nullable=False),
    sa.Column("spent", _F, nullable=False),
    sa.Column("reserved", _F, nullable=False),
)


class LedgerError(SkimpError):
    """The ledger cannot be opened or written; nothing is served that it did not record."""


class BudgetExceededError(SkimpError):
    """A call that could cost more than what is left."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit in US dollars, ``per`` day or month (UTC), or ever."""

    name: str
    usd: float
    per: str = "ever"

    def current(self, now: float) -> str:
        """The name of the row that counts now."""
        if self.per == "ever":
            return self.name
        day = datetime.fromtimestamp(now, UTC)
        return f"{self.name}@{day:%Y-%m-%d}" if self.per == "day" else f"{self.name}@{day:%Y-%m}"


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money set aside for one attempt, US dollars."""

    id: str
    request_id: str
    member: str
    budgets: tuple[Budget, ...]
    amount: float
    at: float
    expires: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of a member.

    Attributes:
        status: ``ok``, ``cancelled``, ``lost``, or the kind of its error.
        reported: Whether the tokens are the provider's. Then ``cost`` is theirs times the price,
            and ``estimate`` 0; else ``cost`` is 0, and ``estimate`` what it may have cost.
        input_price: US dollars per million prompt tokens, as it was then; ``output_price`` alike.
    """

    id: str
    request_id: str
    at: float
    member: str
    status: str
    prompt_tokens: int
    completion_tokens: int
    reported: bool
    input_price: float
    output_price: float
    cost: float
    estimate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a caller: where it went and what that cost, US dollars."""

    id: str
    at: float
    caller: str
    policy: str
    digest: str
    route: str
    served: str | None
    status: str
    confidence: float | None
    cost: float
    estimate: float
    bound: float | None
    seconds: float


@dataclass(slots=True)
class _Op:
    kind: str
    row: Any
    done: "asyncio.Future[None] | None"
    error: Exception | None = None


class Ledger:
    """The ledger.

    Args:
        url: Of SQLAlchemy: ``sqlite:///file.db`` or ``postgresql+psycopg://...``.

    Raises:
        LedgerError: It cannot be opened.
    """

    def __init__(self, url: str) -> None:
        try:
            self.engine = _engine(url)
            self.reader = _reader(self.engine)
            _meta.create_all(self.engine)
        except (SQLAlchemyError, ImportError) as error:
            raise LedgerError(f"the ledger cannot be opened: {_first(error)}") from error
        self._queue: queue.SimpleQueue[_Op | None] = queue.SimpleQueue()
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
        self._queue.put(_Op(kind, row, done))
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
            ops: list[_Op] = []
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

    def _commit(self, ops: list[_Op]) -> None:
        for tries in range(8):
            try:
                with self.engine.begin() as connection:
                    _apply(connection, ops)
                break
            except Exception as error:  # the thread must outlive whatever one batch does
                if tries < 7 and _passing(error):
                    time.sleep(min(0.05 * 2**tries, 1.0))
                    continue
                if len(ops) > 1 and not _passing(
                    error
                ):  # one row cannot be written: the others can
                    for op in ops:
                        self._commit([op])
                    return
                _fail(ops, error)
                break
        by_loop: dict[asyncio.AbstractEventLoop, list[_Op]] = {}
        for op in ops:
            if op.done is not None:
                by_loop.setdefault(op.done.get_loop(), []).append(op)
        for loop, done in by_loop.items():
            try:
                loop.call_soon_threadsafe(_resolve, done)
            except RuntimeError:  # the loop is closed: nobody waits any more
                continue


def _apply(connection: Connection, ops: Sequence[_Op]) -> None:
    """All operations in order, in one transaction."""
    names = sorted({n for op in ops for n in _budget_names(op)})
    swept: list[Any] = []
    for op in ops:
        op.error = None
        if op.kind == "sweep" and not swept:
            query = sa.select(reservations).where(reservations.c.expires < op.row)
            query = query.with_for_update(skip_locked=True)
            swept = list(connection.execute(query).mappings())
    names = sorted({*names, *(n for row in swept for n in row["budgets"].split("\n") if n)})
    books = _lock(connection, names, ops)
    closing = [_held(op).id for op in ops if op.kind in ("settle", "release")]
    held: set[str] = set()
    if closing:
        query = sa.select(reservations.c.id).where(reservations.c.id.in_(closing))
        held = set(connection.execute(query).scalars())
    new: dict[str, dict[str, Any]] = {}
    gone: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    finished: list[dict[str, Any]] = []

    def give_back(r: Reservation) -> bool:
        if new.pop(r.id, None) is None:
            if r.id not in held:
                return False
            held.discard(r.id)
            gone.append({"old": r.id})
        for b in r.budgets:
            book = books[b.current(r.at)]
            book["reserved"] = max(0.0, book["reserved"] - r.amount)
        return True

    for op in ops:
        if op.kind == "reserve":
            r: Reservation = op.row
            mine = [books[b.current(r.at)] for b in r.budgets]
            short = next(
                (b for b in mine if b["spent"] + b["reserved"] + r.amount > b["usd"]), None
            )
            if short is not None:
                left = max(0.0, short["usd"] - short["spent"] - short["reserved"])
                op.error = BudgetExceededError(
                    f"this call may cost ${r.amount:.6f}, and budget {short['name']!r} has "
                    f"${left:.6f} of ${short['usd']:g} left"
                )
                continue
            for book in mine:
                book["reserved"] += r.amount
            new[r.id] = {
                "id": r.id,
                "request_id": r.request_id,
                "member": r.member,
                "budgets": "\n".join(b.current(r.at) for b in r.budgets),
                "amount": r.amount,
                "at": r.at,
                "expires": r.expires,
            }
        elif op.kind == "settle":
            r, attempt = op.row
            spent = attempt.cost + attempt.estimate
            if not give_back(r):  # it was slower than its reservation, and is counted as lost
                lost = (attempts.c.id == r.id) & (attempts.c.status == "lost")
                if connection.execute(sa.delete(attempts).where(lost)).rowcount:
                    spent -= r.amount
            for b in r.budgets:
                books[b.current(r.at)]["spent"] += spent
            tried.append(asdict(attempt))
        elif op.kind == "release":
            give_back(op.row)
        elif op.kind == "finish":
            finished.append(asdict(op.row))
    for row in swept:
        if row["id"] in closing:
            continue  # settled in this very batch
        gone.append({"old": row["id"]})
        for name in row["budgets"].split("\n"):
            if name in books:
                book = books[name]
                book["reserved"] = max(0.0, book["reserved"] - row["amount"])
                book["spent"] += row["amount"]
        tried.append(_lost(row))
    if new:
        connection.execute(sa.insert(reservations), list(new.values()))
    if gone:
        connection.execute(_delete, gone)
    if tried:
        connection.execute(sa.insert(attempts), tried)
    if finished:
        connection.execute(sa.insert(requests), finished)
    changed = [
        {"old": n, "new_spent": b["spent"], "new_reserved": b["reserved"]} for n, b in books.items()
    ]
    if changed:
        connection.execute(_update, changed)


_delete = sa.delete(reservations).where(reservations.c.id == sa.bindparam("old"))
_update = (
    sa.update(budgets)
    .where(budgets.c.name == sa.bindparam("old"))
    .values(spent=sa.bindparam("new_spent"), reserved=sa.bindparam("new_reserved"))
)


def _lost(row: Any) -> dict[str, Any]:
    return asdict(
        Attempt(
            id=row["id"],
            request_id=row["request_id"],
            at=row["at"],
            member=row["member"],
            status="lost",
            prompt_tokens=0,
            completion_tokens=0,
            reported=False,
            input_price=0.0,
            output_price=0.0,
            cost=0.0,
            estimate=row["amount"],
            seconds=0.0,
        )
    )


def _budget_names(op: _Op) -> list[str]:
    if op.kind not in ("reserve", "settle", "release"):
        return []
    r = _held(op)
    return [b.current(r.at) for b in r.budgets]


def _held(op: _Op) -> Reservation:
    found: Reservation = op.row[0] if op.kind == "settle" else op.row
    return found


def _lock(
    connection: Connection, names: Sequence[str], ops: Sequence[_Op]
) -> dict[str, dict[str, Any]]:
    """The budgets by name, locked in the order of names, made where they are new."""
    if not names:
        return {}
    limits = {
        b.current(op.row.at): b.usd for op in ops if op.kind == "reserve" for b in op.row.budgets
    }
    query = (
        sa.select(budgets)
        .where(budgets.c.name.in_(names))
        .order_by(budgets.c.name)
        .with_for_update()
    )
    books = {row["name"]: dict(row) for row in connection.execute(query).mappings()}
    missing = [n for n in names if n not in books]
    if missing:
        insert = _insert_new(connection)
        fresh = [
            {"name": n, "usd": limits.get(n, 0.0), "spent": 0.0, "reserved": 0.0} for n in missing
        ]
        connection.execute(insert, fresh)
        books = {row["name"]: dict(row) for row in connection.execute(query).mappings()}
    for name, usd in limits.items():
        if books[name]["usd"] != usd:  # the configuration was changed
            books[name]["usd"] = usd
            change = sa.update(budgets).where(budgets.c.name == name).values(usd=usd)
            connection.execute(change)
    return books


def _insert_new(connection: Connection) -> Any:
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    return insert(budgets).on_conflict_do_nothing()


def _engine(url: str) -> Engine:
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


def _reader(engine: Engine) -> Engine:
    """An engine that takes no write lock."""
    if engine.dialect.name == "sqlite":
        args = {"timeout": 30, "check_same_thread": False}
        return sa.create_engine(engine.url, connect_args=args)
    return engine


def _fail(ops: Sequence[_Op], error: Exception) -> None:
    failure = LedgerError(f"the ledger cannot be written: {_first(error)}")
    for op in ops:
        op.error = failure


def _resolve(ops: Sequence[_Op]) -> None:
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


def _passing(error: Exception) -> bool:
    """Whether the database may be back in a moment: it restarts, or is locked."""
    if not isinstance(error, OperationalError):
        return False
    text = str(error.orig)
    return "sqlite" not in type(error.orig).__module__ or "locked" in text or "busy" in text


def _first(error: Exception) -> str:
    """The first line of a database error, which holds no parameters."""
    return str(getattr(error, "orig", None) or error).splitlines()[0][:200]
