"""A judge of answer pairs that learns while it judges (LWE), where its verdicts depend on order.

Learning While Evaluating, arXiv 2512.06751. The judge keeps a guide for writing judging
instructions. It asks itself for instructions that fit a pair, judges with them, criticises the
judgment, and every few pairs rewrites the guide from that. Selective: both orders of every pair are
judged plainly first, and only where the verdict depends on the order is the rest done.

Calls per pair, with b pairs to an update and a share rho that depends on order:
``selective`` 2 + rho (3 + 1/b), ``frozen`` 2 + 2 rho, ``full`` 3 + 1/b. Beyond the paper:
re-judging both orders under the same instructions (``both``), anchors that an update must not get
wrong, a log of every version of the guide, and a coin as the null that any gain has to beat.
"""

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...ir.cost import write_atomically
from ...ir.errors import MALFORMED, ArtefactError, CalibrationError
from . import judge_prompts as prompts
from .judge_prompts import FIRST_GUIDE, LEAST, MOST, Lesson, Pair
from .responses import Messages, ResponseCache, ask, call_params
from .traces import read_lines
from .trip import Entry

Mode = Literal["selective", "frozen", "full"]
Ask = Callable[[str, str], Awaitable[str]]
"""A stage (``vanilla``, ``rubric``, ``judge``, ``feedback``, ``update`` ...) and a prompt."""
LOG = "skimp-judge-log"
VERDICT_TOKENS = 64
"""A verdict is three tokens; some judges say why."""


@dataclass(frozen=True, slots=True)
class Version:
    """A guide that was in force, or was refused.

    Attributes:
        number: Of the version; 0 is the first guide.
        text: The guide.
        parent: The version it was made from.
        status: ``first``, ``kept``, or why it was refused.
        pairs: What it was learned from.
        anchors: Share of anchors that it judges as it should; ``None`` if there are none.
    """

    number: int
    text: str
    parent: int | None
    status: str
    pairs: tuple[str, ...] = ()
    anchors: float | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about a pair.

    Attributes:
        id: The pair's.
        winner: ``A`` or ``B``; ``None`` if the judge said neither or both.
        swapped: The winner with the answers in the other order, said of the original order; under
            the same prompt as ``winner``, or ``None`` where that was not asked.
        consistent: Whether both orders agree; ``None`` where only one was judged.
        plain: The first verdicts of both orders, said of the original order.
        version: Of the guide; ``None`` where it was not needed.
    """

    id: str
    winner: str | None
    swapped: str | None
    consistent: bool | None
    plain: tuple[str | None, str | None]
    version: int | None = None


@dataclass(slots=True)
class Judged:
    """Verdicts in the order of the pairs, the versions of the guide, and the calls by stage."""

    verdicts: list[Verdict]
    versions: list[Version]
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def guide(self) -> Version:
        """The version in force at the end."""
        return in_force(self.versions)

    @property
    def learned_from(self) -> int:
        """Pairs that the judge went through a second time."""
        return sum(v.version is not None for v in self.verdicts)


def in_force(versions: Sequence[Version]) -> Version:
    """The last version that was not refused."""
    return next(v for v in reversed(versions) if v.status in ("first", "kept"))


class Judge:
    """Judges pairs.

    Args:
        ask: The model, at temperature 0.
        mode: See this module; ``frozen`` never updates its guide, the ablation that isolates what
            learning adds.
        batch: Pairs to an update, b.
        seed: Of the order of the pairs, on which what is learned depends.
        both: Judge both orders again under the same instructions, one more call: else whether a
            new verdict depends on order is not known, and not claimed.
        anchors: Pairs with the verdict they must get; an update that gets fewer of them right
            than the guide before it is refused. A number takes so many of the pairs whose plain
            verdict did not depend on order, with that verdict: no label is needed.
        guide: To start from.
        at_once: Calls under way.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        mode: Mode = "selective",
        batch: int = 4,
        seed: int = 0,
        both: bool = False,
        anchors: Sequence[tuple[Pair, str]] | int = (),
        guide: str = FIRST_GUIDE,
        at_once: int = 4,
    ) -> None:
        if mode not in ("selective", "frozen", "full") or batch < 1:
            raise CalibrationError(f"mode {mode!r}, batch {batch}: no such judge")
        self._ask, self.mode, self.batch, self.seed, self.both = ask, mode, batch, seed, both
        self.wanted = anchors if isinstance(anchors, int) else 0
        self.anchors = [] if isinstance(anchors, int) else list(anchors)
        self._slots = asyncio.Semaphore(at_once)
        self.calls: Counter[str] = Counter()
        self.versions = [Version(0, guide, None, "first")]
        self._current = self.versions[0]

    async def judge(self, pairs: Sequence[Pair]) -> Judged:
        """Judge pairs, learning on the way."""
        order = np.random.default_rng(self.seed).permutation(len(pairs))
        found: dict[int, Verdict] = {}
        again = list(map(int, order))
        if self.mode != "full":
            plain = await asyncio.gather(*(self.plain(p) for p in pairs))
            found = {i: v for i, v in enumerate(plain) if v.consistent}
            again = [i for i in again if i not in found]
            firsts = {i: plain[i].plain for i in again}
            sure = [(pairs[i], str(found[i].winner)) for i in map(int, order) if i in found]
            self.anchors += sure[: self.wanted]
        else:
            firsts = dict.fromkeys(again, (None, None))
        for at in range(0, len(again), self.batch):
            rows = again[at : at + self.batch]
            done = await asyncio.gather(*(self._learn(pairs[i], firsts[i]) for i in rows))
            found |= {i: verdict for i, (verdict, _) in zip(rows, done, strict=True)}
            if self.mode != "frozen":
                await self._update([lesson for _, lesson in done if lesson is not None])
        verdicts = [found[i] for i in range(len(pairs))]
        return Judged(verdicts, list(self.versions), Counter(self.calls))

    async def plain(self, pair: Pair) -> Verdict:
        """Both orders, with no instructions."""
        one, two = await asyncio.gather(
            self.say("vanilla", prompts.vanilla(pair)),
            self.say("vanilla", prompts.vanilla(pair.swapped)),
        )
        a, b = prompts.read_verdict(one), flipped(prompts.read_verdict(two))
        return Verdict(pair.id, a, b, a is not None and a == b, (a, b))

    async def instructed(self, pair: Pair, guide: str, stage: str = "") -> tuple[str, str, str]:
        """Instructions for a pair, what was asked with them, and the judgment."""
        told = await self.say(stage or "rubric", prompts.rubric(guide, pair))
        asked = prompts.judge(told, pair)
        return told, asked, await self.say(stage or "judge", asked)

    async def _learn(
        self, pair: Pair, plain: tuple[str | None, str | None]
    ) -> tuple[Verdict, Lesson | None]:
        guide = self._current
        told, asked, judgment = await self.instructed(pair, guide.text)
        winner, swapped = prompts.read_verdict(judgment), None
        if self.both:
            other = await self.say("swap", prompts.judge(told, pair.swapped))
            swapped = flipped(prompts.read_verdict(other))
        consistent = winner is not None and winner == swapped if self.both else None
        verdict = Verdict(pair.id, winner, swapped, consistent, plain, guide.number)
        if self.mode == "frozen":
            return verdict, None
        said = await self.say("feedback", prompts.feedback(guide.text, asked, judgment))
        return verdict, Lesson(pair, judgment, prompts.read_feedback(said))

    async def _update(self, lessons: Sequence[Lesson]) -> None:
        """Rewrite the guide, unless what comes back is worse than what there is."""
        old = self._current
        reply = await self.say("update", prompts.update(old.text, lessons))
        text = prompts.read_guide(reply)
        if text is not None and len(text) > MOST:
            text = prompts.read_guide(await self.say("condense", prompts.condense(text))) or text
        status, right = "kept", None
        if text is None:
            status = "refused: no guide in the reply"
        elif len(text) < LEAST:
            status = f"refused: {len(text)} characters, {LEAST} at least"
        elif len(text) > MOST:
            status = f"refused: {len(text)} characters, {MOST} at most"
        elif self.anchors:
            before = old.anchors if old.anchors is not None else await self._right(old.text)
            right = await self._right(text)
            if right < before:
                status = f"refused: {right:.3f} of the anchors right, {before:.3f} before"
        pairs = tuple(lesson.pair.id for lesson in lessons)
        text = reply if text is None else text
        new = Version(len(self.versions), text, old.number, status, pairs, right)
        self.versions.append(new)
        if status == "kept":
            self._current = new

    async def _right(self, guide: str) -> float:
        """Share of the anchors that a guide gets right in both orders."""

        async def one(pair: Pair, wanted: str) -> bool:
            told, _, judgment = await self.instructed(pair, guide, "anchor")
            other = await self.say("anchor", prompts.judge(told, pair.swapped))
            said = prompts.read_verdict(judgment), flipped(prompts.read_verdict(other))
            return said == (wanted, wanted)

        return float(np.mean(await asyncio.gather(*(one(p, w) for p, w in self.anchors))))

    async def say(self, stage: str, prompt: str) -> str:
        """One call."""
        async with self._slots:
            self.calls[stage] += 1
            return await self._ask(stage, prompt)


def flipped(verdict: str | None) -> str | None:
    """The verdict on a swapped pair, said of the original order."""
    return {"A": "B", "B": "A"}.get(verdict or "")


def expected_calls(pairs: int, again: int, batch: int) -> int:
    """Of selective judging: 2 n + 3 m + m / b, the last update for a remainder included."""
    return 2 * pairs + 3 * again + math.ceil(again / batch)


def score(verdicts: Sequence[Verdict], labels: Mapping[str, str]) -> dict[str, Any]:
    """How good verdicts are. Labels come in here, after all is judged, and nowhere else.

    ``null`` is a coin in place of every second judgment: its mean accuracy and 95 % interval, and
    the consistency that it would seem to have if its verdict were compared with the *old* one of
    the swapped order, as the authors' code does: half of the inconsistent pairs for nothing.
    """
    n = len(verdicts)
    hit = {v.id: v.winner == labels[v.id] for v in verdicts if v.id in labels}
    again = [v for v in verdicts if v.version is not None]
    base = sum(hit.get(v.id, False) for v in verdicts if v.version is None)
    wide = 1.96 * math.sqrt(len(again)) / 2
    found: dict[str, Any] = {
        "pairs": n,
        "again": len(again),
        "rho": len(again) / n if n else 0.0,
        "unread": sum(v.winner is None for v in verdicts),
        "plain_consistency": sum(
            v.plain[0] is not None and v.plain[0] == v.plain[1] for v in verdicts
        )
        / max(n, 1),
        "consistency": None,
        "null_mixed_consistency": (n - len(again) / 2) / max(n, 1),
    }
    known = all(v.consistent is not None for v in verdicts)
    if known:
        found["consistency"] = sum(bool(v.consistent) for v in verdicts) / max(n, 1)
    if len(hit) == n and n:
        if any(any(v.plain) for v in verdicts):
            found["plain_acc"] = sum(v.plain[0] == labels[v.id] for v in verdicts) / n
        found["acc"] = sum(hit.values()) / n
        found["null"] = {
            "acc": (base + len(again) / 2) / n,
            "low": (base + max(len(again) / 2 - wide, 0)) / n,
            "high": (base + min(len(again) / 2 + wide, len(again))) / n,
        }
        found["swap_acc"] = found["pair_acc"] = None
        if known:
            found["swap_acc"] = sum(v.swapped == labels[v.id] for v in verdicts) / n
            found["pair_acc"] = sum(v.winner == v.swapped == labels[v.id] for v in verdicts) / n
    return found


# -- files ----------------------------------------------------------------------------------------


def read_pairs(path: Path) -> tuple[list[Pair], dict[str, str]]:
    """Pairs, one JSON object per line, and labels where there are any, apart from them.

    ``{"id", "question", "a", "b", "label": "A"}``, or with LLMBar's names ``input``, ``output_1``,
    ``output_2``, ``label: 1``.
    """
    pairs, labels = [], {}
    for at, line in read_lines(path):
        try:
            row = json.loads(line)
            texts = [
                str(row[k] if k in row else row[other])
                for k, other in (("question", "input"), ("a", "output_1"), ("b", "output_2"))
            ]
        except MALFORMED as error:
            raise CalibrationError(f"{path}, line {at}: no pair: {error!r}") from error
        pair = Pair(str(row.get("id", at)), *texts)
        pairs.append(pair)
        if "label" in row:
            label = {"1": "A", "2": "B"}.get(str(row["label"]), str(row["label"]))
            if label not in ("A", "B"):
                raise CalibrationError(f"{path}, line {at}: label {label!r} is neither A nor B")
            labels[pair.id] = label
    if len({p.id for p in pairs}) < len(pairs) or not pairs:
        raise CalibrationError(f"{path} holds no pairs, or two of one id")
    return pairs, labels


def save_log(judged: Judged, path: Path) -> None:
    """Write every version of the guide, those refused too."""
    record = {"format": LOG, "version": 1, "calls": dict(judged.calls)}
    record |= {"versions": [asdict(v) | {"sha256": v.digest} for v in judged.versions]}
    write_atomically(path, json.dumps(record, indent=1).encode() + b"\n")


def read_log(path: Path) -> list[Version]:
    """The versions of a log.

    Raises:
        ArtefactError: It is missing, foreign, or a text is not what was logged.
    """
    try:
        record = json.loads(path.read_text())
        if record["format"] != LOG or record["version"] != 1:
            raise ValueError("another format or version")
        fields = ("number", "text", "parent", "status", "pairs", "anchors")
        rows = [{k: row[k] for k in fields} for row in record["versions"]]
        found = [Version(**row | {"pairs": tuple(row["pairs"])}) for row in rows]
        if any(v.digest != r["sha256"] for v, r in zip(found, record["versions"], strict=True)):
            raise ArtefactError(f"{path} was changed by hand: the hash of a guide does not fit")
    except (OSError, *MALFORMED) as error:
        raise ArtefactError(f"{path} is no log of a judge: {error!r}") from error
    return found


class MemberJudge:
    """A member as the model of a judge, at temperature 0; nothing is asked twice.

    Args:
        entry: The member.
        cache: Where responses are kept.
        max_tokens: Of rubrics, feedback and guides; a verdict gets no more than it needs.
    """

    def __init__(
        self, entry: Entry, cache: ResponseCache | None = None, max_tokens: int | None = None
    ) -> None:
        self.entry = entry
        self.cache = cache if cache is not None else ResponseCache()
        self.max_tokens = max_tokens or entry.max_tokens
        self.spent = 0.0

    async def __call__(self, stage: str, prompt: str) -> str:
        """See :data:`Ask`."""
        short = stage in ("vanilla", "judge", "swap")
        limit = min(self.max_tokens, VERDICT_TOKENS) if short else self.max_tokens
        params = call_params(self.entry, 1) | {"temperature": 0, "max_tokens": limit}
        messages: Messages = [{"role": "user", "content": prompt}]
        response = self.cache.get(self.entry.name, messages, params)
        if response is None:
            response = await ask(self.entry, messages, params)
            self.spent += response.cost
            self.cache.put(self.entry.name, messages, params, 0, response)
        if response.error is not None:  # an empty verdict would look like one that depends on order
            raise CalibrationError(
                f"the judge {self.entry.name!r} did not answer ({response.error}). What it said so "
                "far is in the cache of responses, if there is one: run again to go on"
            )
        return response.text
