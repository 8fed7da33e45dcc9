"""Recorded samples of every member, from which a policy is calibrated.

One JSON object per line, one line per query::

    {"id": "q1", "members": {"small": {"samples": [{"text": "... 18", "prompt_tokens": 90,
     "completion_tokens": 40}, ...]}, "large": {...}}}

A sample has a ``text`` or an ``answer``. What it cost is its tokens at the member's price, where
one is given, or its ``cost`` in US dollars. A failed sample has an ``error``, no answer, and a cost
all the same. Other keys are not read: a gold label cannot leak into a policy.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import CalibrationError, unwritable
from .extract import canonical, extractor, vote
from .price import Price

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemberSpec:
    """A member as calibration sees it: its name, how many samples it draws, its price."""

    name: str
    samples: int
    price: Price | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """What each member would answer, how surely, and at what cost. Drawn once, then fixed.

    Attributes:
        members: In the order of escalation; the last is the most powerful.
        answer: ``[n, M]`` int64, the number of the answer within its query; -1 is no answer.
        confidence: ``[n, M]`` float64 in 0 to 1, the mode's share of the samples.
        cost: ``[n, M]`` float64, US dollars of all samples of the member.
        ids: One per query.
        digest: SHA-256 of all of the above.
        warnings: What looked wrong but could be used.
    """

    members: tuple[MemberSpec, ...]
    answer: NDArray[np.int64]
    confidence: NDArray[np.float64]
    cost: NDArray[np.float64]
    ids: tuple[str, ...]
    digest: str
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> "Table":
        """Some of the queries."""
        return Table(
            self.members,
            self.answer[rows],
            self.confidence[rows],
            self.cost[rows],
            tuple(self.ids[i] for i in rows),
            self.digest,
        )


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers from 1.

    Raises:
        CalibrationError: It cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # texts may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    return ((at, line) for at, line in enumerate(lines, 1) if line.strip())


def append(path: Path, *rows: Mapping[str, Any]) -> None:
    """Add objects to a file, a line of JSON each; on disk before this returns.

    Raises:
        UnwritableError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise unwritable(path, error) from error


def read_traces(path: Path) -> list[dict[str, Any]]:
    """Read a file of traces.

    Raises:
        CalibrationError: It cannot be read, or a line is not a JSON object; says which.
    """
    rows = []
    for at, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}, line {at}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("members"), dict):
            raise CalibrationError(f"{path}, line {at}: no object with `members`")
        rows.append(row)
    if not rows:
        raise CalibrationError(f"{path} holds no traces")
    return rows


def tabulate(
    traces: Sequence[Mapping[str, Any]],
    members: Sequence[MemberSpec],
    *,
    extract: str = "number",
    seed: int = 0,
    least_answers: float = 0.5,
) -> Table:
    """Draw each member's samples once, and reduce them to answers, confidences and costs.

    Where more samples are stored than a member draws, they are drawn without replacement, with the
    seed and the query's id alone: loss, cost and the strongest member's answer see the same draw.

    Args:
        traces: What :func:`read_traces` gave.
        members: In the order of escalation.
        extract: See :func:`skimp.runtime.cascade.extract.extractor`.
        seed: Of the draws.
        least_answers: Refuse if the strongest member has an answer for a smaller share.

    Raises:
        CalibrationError: A member is missing, has too few samples or no cost, or hardly any answer
            could be extracted; says where.
    """
    if len(members) < 2:
        raise CalibrationError(f"a cascade needs two members or more, not {len(members)}")
    find = extractor(extract)
    shape = (len(traces), len(members))
    answer = np.full(shape, -1, np.int64)
    confidence = np.zeros(shape)
    cost = np.zeros(shape)
    ids, repeated = [], 0
    for i, trace in enumerate(traces):
        ids.append(str(trace.get("id", i)))
        numbers: dict[str, int] = {}
        for j, member in enumerate(members):
            where = f"trace {ids[-1]!r}, member {member.name!r}"
            samples = draw_samples(trace, member, where, seed)
            answers = [sample_answer(s, find, where) for s in samples]
            chosen, confidence[i, j] = vote(answers)
            if chosen is not None:
                answer[i, j] = numbers.setdefault(chosen, len(numbers))
            cost[i, j] = sum(sample_cost(s, member, where) for s in samples)
            texts = [s["text"] for s in samples if isinstance(s.get("text"), str)]
            repeated += len(set(texts)) < len(texts)
    _check_unique(ids)
    warnings = []
    if repeated:
        warnings.append(
            f"{repeated} of {answer.size} draws hold the same text twice: at temperature 0, or "
            "with one seed, samples agree whether or not they are right"
        )
    answered = float((answer[:, -1] >= 0).mean())
    if answered < least_answers:
        raise CalibrationError(
            f"extractor {extract!r} finds an answer in {answered:.0%} of the queries of "
            f"{members[-1].name!r}: such text has no mode to vote on. Choose another extractor"
        )
    for warning in warnings:
        log.warning(warning)
    digest = _digest(members, extract, seed, ids, answer, confidence, cost)
    return Table(tuple(members), answer, confidence, cost, tuple(ids), digest, tuple(warnings))


def draw_samples(
    trace: Mapping[str, Any], member: MemberSpec, where: str, seed: int
) -> list[Mapping[str, Any]]:
    """The samples that a member draws of those stored, with the seed and the id alone."""
    found = trace["members"].get(member.name)
    samples = found.get("samples") if isinstance(found, Mapping) else None
    if not isinstance(samples, list) or not all(isinstance(s, Mapping) for s in samples):
        raise CalibrationError(f"{where}: no list `samples`")
    if len(samples) < member.samples:
        raise CalibrationError(
            f"{where}: {len(samples)} samples, but {member.samples} are to be drawn"
        )
    if len(samples) == member.samples:
        return samples
    key = hashlib.sha256(f"{seed}/{member.name}/{trace.get('id', where)}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(key[:8])).permutation(len(samples))
    return [samples[k] for k in sorted(order[: member.samples])]


def sample_answer(sample: Mapping[str, Any], find: Any, where: str) -> str | None:
    """The answer of a sample, found in its text if it was not recorded."""
    if sample.get("error"):
        return None
    if "answer" in sample:
        given = sample["answer"]
        plain = given is None or isinstance(given, str)
        return given if plain else canonical(str(given)) or str(given)
    if isinstance(sample.get("text"), str):
        found = find(sample["text"])
        return found if found is None else str(found)
    raise CalibrationError(f"{where}: a sample without `text`, `answer` or `error`")


def sample_cost(sample: Mapping[str, Any], member: MemberSpec, where: str) -> float:
    """US dollars of a sample."""
    if member.price is not None and sample.get("completion_tokens") is not None:
        value = member.price.of(
            _number(sample, "prompt_tokens", where), _number(sample, "completion_tokens", where)
        )
    elif sample.get("cost") is not None:
        value = _number(sample, "cost", where)
    else:
        raise CalibrationError(
            f"{where}: a sample without `cost`, and without tokens and a price; a failed call "
            "costs something too"
        )
    if not 0 <= value < float("inf"):
        raise CalibrationError(f"{where}: a cost of {value}")
    return value


def _number(sample: Mapping[str, Any], name: str, where: str) -> Any:
    value = sample.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CalibrationError(f"{where}: `{name}` is {value!r}, not a number")
    if isinstance(value, int) and abs(value) > 10**300:
        raise CalibrationError(f"{where}: `{name}` is a whole number that no float holds")
    return value


def _check_unique(ids: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise CalibrationError(f"two traces have the id {name!r}; one query counts once")
        seen.add(name)


def _digest(
    members: Sequence[MemberSpec], extract: str, seed: int, ids: Sequence[str], *arrays: Any
) -> str:
    head = [[[m.name, m.samples] for m in members], extract, seed, list(ids)]
    hashed = hashlib.sha256(json.dumps(head).encode())
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()
