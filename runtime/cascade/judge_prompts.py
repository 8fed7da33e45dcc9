"""What a judge is told. Our own words; the roles are those of Learning While Evaluating.

Every function sees a pair and texts that the judge wrote itself. None takes a label, so none can
tell one.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .wire import value_at

LEAST = 726
"""Characters of a guide, under which something was lost; the scale of the first one."""
MOST = 10_000
"""Characters of a guide, over which it is condensed once."""

FIRST_GUIDE = """\
You write instructions for a judge who will compare two answers to one request.
Study the request and both answers first, then write instructions that fit exactly this kind of \
request. They must hold:
1. Three to six criteria that decide this comparison, the most important first, each with one \
sentence on how to check it. What was explicitly asked for outranks style, length and politeness.
2. Numbered steps that the judge goes through: restate the request, check each answer against \
every criterion, note what is wrong or missing in each, then weigh the two.
3. A reminder that neither the order of the answers nor their length is a reason to prefer one.
4. The last line, which tells the judge to finish with [[A]] if the first answer is better and \
with [[B]] if the second is.
Reply with the instructions alone, without preface or comment."""

_RUBRIC_RULES = """\
Rules: do not judge the answers yourself and do not hint at a preference. Always give criteria and \
steps made for this example. Never quote or copy the request or the answers into them: the judge \
will see those separately."""

_VANILLA = """\
Two assistants answered the same request. Decide which answer serves it better: whether it does \
what was asked, correctly and completely. The order of the answers means nothing, nor does length \
as such."""

_FINAL = """\
Give the final judgment only: [[A]] if answer A is better, [[B]] if answer B is better."""

_FEEDBACK = """\
Look back at a judgment that you made, as a critic of your own work. Go through this list: (1) say \
again what the criteria were; (2) hold both answers against each; (3) was the first answer \
preferred for being first, or (4) the longer for being long; (5) did tone pass for substance; \
(6) was a statement believed because it sounded sure; (7) was something judged that nobody asked \
for; (8) write one to three tips that would help with other requests of this kind.
Reply with one JSON object and nothing else:
{"score": 1 to 5, "label": "certain" or "not sure", "tips": ["..."], "reasoning": "..."}
The score says how sure you are now that the judgment was right."""

_UPDATE = """\
Below is a guide for writing judging instructions, and what came of its last uses: inputs, \
judgments and self-criticism. Improve the guide. Keep what works. Add only advice that is general \
and can be used again, never anything about one example, and nothing that the guide says already. \
It must go on asking for instructions that end in [[A]] or [[B]].
Reply with the whole new guide between <guide> and </guide>."""

_CONDENSE = """\
This guide has become too long. Rewrite it in about half its length without losing any rule: merge \
what repeats, cut examples and filler. Reply with the new guide between <guide> and </guide>."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one request. There is no place for a label here."""

    id: str
    question: str
    a: str
    b: str

    @property
    def swapped(self) -> "Pair":
        """In the other order."""
        return Pair(self.id, self.question, self.b, self.a)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What came of judging a pair with instructions: it is what a guide learns from."""

    pair: Pair
    judgment: str
    feedback: str


def example(pair: Pair) -> str:
    """A pair as prompts show it."""
    return (
        f"<request>\n{pair.question}\n</request>\n\n<answer_A>\n{pair.a}\n</answer_A>\n\n"
        f"<answer_B>\n{pair.b}\n</answer_B>"
    )


def vanilla(pair: Pair) -> str:
    """Judge with no instructions of its own."""
    return f"{_VANILLA}\n\n{example(pair)}\n\n{_FINAL}"


def rubric(guide: str, pair: Pair) -> str:
    """Ask for instructions that fit a pair."""
    return f"{guide}\n\n{_RUBRIC_RULES}\n\n{example(pair)}"


def judge(instructions: str, pair: Pair) -> str:
    """Judge with instructions."""
    return f"{instructions}\n\n{example(pair)}\n\n{_FINAL}"


def feedback(guide: str, asked: str, judgment: str) -> str:
    """Ask what the judge thinks of a judgment."""
    return (
        f"{_FEEDBACK}\n\n<guide>\n{guide}\n</guide>\n\n<asked>\n{asked}\n</asked>\n\n"
        f"<judgment>\n{judgment}\n</judgment>"
    )


def update(guide: str, lessons: Sequence[Lesson]) -> str:
    """Ask for a better guide."""
    parts = [
        f"<use>\n{example(lesson.pair)}\n<judgment>\n{lesson.judgment}\n</judgment>\n"
        f"<criticism>\n{lesson.feedback}\n</criticism>\n</use>"
        for lesson in lessons
    ]
    return f"{_UPDATE}\n\n<guide>\n{guide}\n</guide>\n\n" + "\n\n".join(parts)


def condense(guide: str) -> str:
    """Ask for the same in half the length."""
    return f"{_CONDENSE}\n\n<guide>\n{guide}\n</guide>"


# -- what comes back ------------------------------------------------------------------------------


def read_verdict(text: str) -> str | None:
    """``A``, ``B``, or ``None`` where both or neither are named. ``[[A]]`` goes before ``[A]``."""
    for left, right in (("[[", "]]"), ("[", "]")):
        named = [x for x in "AB" if f"{left}{x}{right}" in text]
        if named:
            return named[0] if len(named) == 1 else None
    return None


def read_guide(text: str) -> str | None:
    """The guide in a reply; ``None`` if there is none."""
    found = re.findall(r"<guide>(.*?)</guide>", text, re.DOTALL)
    return found[-1].strip() or None if found else None


def read_feedback(text: str) -> str:
    """Feedback in one form; what cannot be parsed is kept as it came."""
    at = text.find("{")
    try:
        found = value_at(text, at)[0] if at >= 0 else None
    except ValueError:
        found = None
    return json.dumps(found, ensure_ascii=False) if isinstance(found, dict) else text
