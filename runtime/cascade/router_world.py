"""What a router plays on: questions, members, and what each would say next. Deterministic.

A member's response depends on the question and on what was said before it, and on nothing else, so
every part of the tree is computed once. Where responses come from is a function: recorded traces, a
response cache, live members behind one, or a script in a test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...ir.errors import CalibrationError
from .collect import prompt_rows
from .extract import canonical, extractor, vote
from .responses import Messages, Response, prompt_hash
from .traces import MemberSpec, draw_samples, sample_answer, sample_cost

HANDOVER = "That was written by another model. Use what is right in it, and answer the question."
"""Said after each earlier response, so that the next member knows whose turn it is."""

Context = Literal["append", "question"]
Source = Callable[[str, Messages], Sequence[Response]]
Steps = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """A query to train on.

    Attributes:
        id: Its name.
        messages: As they would be sent.
        gold: The right answer, if it is known; no prompt ever holds it.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    gold: str | None = None

    @property
    def text(self) -> str:
        """What an embedder reads."""
        return text_of(self.messages)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a member said at a point of the tree.

    Attributes:
        text: That stands for the mode of its samples.
        answer: The mode.
        confidence: Its share.
        cost: US dollars of this hop.
        quality: In 0 to 1, if it were served.
    """

    text: str
    answer: str | None
    confidence: float
    cost: float
    quality: float


def text_of(messages: Messages) -> str:
    """The text in messages."""
    parts = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = " ".join(str(p.get("text", "")) for p in content if isinstance(p, Mapping))
        if isinstance(content, str):
            parts.append(content)
    return "\n".join(parts)


def chained(messages: Messages, said: Sequence[str]) -> list[Mapping[str, Any]]:
    """The context of the next member: the question, and what the others said."""
    found = list(messages)
    for text in said:
        found.append({"role": "assistant", "content": text})
        found.append({"role": "user", "content": HANDOVER})
    return found


class World:
    """Questions and members.

    Args:
        questions: All of them.
        members: Names and samples.
        source: A member's samples for some messages.
        extract: How answers are found in texts.
        quality: ``gold`` (the answer is the right one), ``score`` (as recorded), ``agreement``
            (with the last member's answer to the bare question: needs no labels), or a function of
            question and text.
        context: Whether later members see what was said before, or the bare question.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        members: Sequence[MemberSpec],
        source: Source,
        *,
        extract: str = "number",
        quality: str | Callable[[Question, str], float] = "gold",
        context: Context = "append",
    ) -> None:
        self.questions, self.members = list(questions), tuple(members)
        self.source, self.extract, self.quality, self.context = source, extract, quality, context
        self._find = extractor(extract)
        self._known: dict[tuple[int, Steps], Outcome] = {}
        if quality == "gold" and any(q.gold is None for q in self.questions):
            raise CalibrationError(
                "the quality of an answer is to be compared with a right one, and not every "
                "question has `answer`: give them, or ask for agreement with the last member"
            )

    def after(self, q: int, path: Steps) -> Outcome:
        """What the last member of a path of members says to a question."""
        if self.context == "question":
            path = path[-1:]
        if (q, path) not in self._known:
            self._known[q, path] = self._ask(q, path)
        return self._known[q, path]

    def said(self, q: int, path: Steps) -> str:
        """The last response on a path, or nothing at its beginning."""
        return self.after(q, path).text if path else ""

    def _ask(self, q: int, path: Steps) -> Outcome:
        question, spec = self.questions[q], self.members[path[-1]]
        before = [self.after(q, path[:i]).text for i in range(1, len(path))]
        samples = list(self.source(spec.name, chained(question.messages, before)))
        answers = [s.answer if s.answer is not None else self._find(s.text) for s in samples]
        mode, confidence = vote(answers)
        best = samples[answers.index(mode)] if mode is not None else samples[0]
        cost = sum(s.cost for s in samples)
        return Outcome(
            best.text, mode, confidence, cost, self._quality(question, q, path, best, mode)
        )

    def _quality(
        self, question: Question, q: int, path: Steps, best: Response, mode: str | None
    ) -> float:
        if callable(self.quality):
            return float(self.quality(question, best.text))
        if self.quality == "score":
            if best.score is None:
                raise CalibrationError(f"question {question.id!r}: a response without a score")
            return best.score
        if mode is None:
            return 0.0
        if self.quality == "gold":
            return float(mode == _plain(str(question.gold)))
        if self.quality != "agreement":
            raise CalibrationError(f"quality {self.quality!r}: 'gold', 'score' or 'agreement'")
        last = (len(self.members) - 1,)
        return 1.0 if path == last else float(mode == self.after(q, last).answer)


def _plain(text: str) -> str:
    return canonical(text) or text.strip()


def read_questions(path: Path) -> list[Question]:
    """Prompts as for ``skimp cascade collect``, with ``answer`` where it is known."""
    questions = []
    for row, prompt in prompt_rows(path):
        found = row.get("answer")
        if isinstance(found, str) and "####" in found:  # as GSM8K writes its solutions
            found = found.rpartition("####")[2].strip()
        gold = None if found is None else str(found)
        questions.append(Question(prompt["id"], tuple(prompt["messages"]), gold))
    return questions


def distinct(questions: Sequence[Question]) -> list[int]:
    """Numbers of the questions, each text once, white space and case aside."""
    seen: dict[str, int] = {}
    for i, question in enumerate(questions):
        seen.setdefault(" ".join(question.text.lower().split()), i)
    return list(seen.values())


def recorded(
    traces: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    members: Sequence[MemberSpec],
    *,
    extract: str = "number",
    seed: int = 0,
) -> Source:
    """What members said to the bare questions, as ``skimp cascade collect`` recorded it.

    Draws are those of :func:`skimp.runtime.cascade.traces.tabulate` for the same seed.

    Raises:
        CalibrationError: A question has no trace, or a trace is malformed.
    """
    find = extractor(extract)
    by_id = {str(t.get("id", i)): t for i, t in enumerate(traces)}
    known: dict[tuple[str, str], list[Response]] = {}
    for question in questions:
        trace = by_id.get(question.id)
        if trace is None:
            raise CalibrationError(f"question {question.id!r} has no trace")
        for member in members:
            where = f"trace {question.id!r}, member {member.name!r}"
            found = [
                Response(
                    str(s.get("text", "")),
                    sample_cost(s, member, where),
                    # an answer that is not there must not be looked for again in the text
                    sample_answer(s, find, where) if "score" not in s or "answer" in s else None,
                    float(s["score"]) if "score" in s else None,
                )
                for s in draw_samples(trace, member, where, seed)
            ]
            known[member.name, prompt_hash(question.messages)] = found

    def source(member: str, messages: Messages) -> Sequence[Response]:
        try:
            return known[member, prompt_hash(messages)]
        except KeyError:
            raise CalibrationError(
                "traces hold answers to bare questions: use context 'question', or a response cache"
            ) from None

    return source
