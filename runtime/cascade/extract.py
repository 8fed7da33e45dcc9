"""Find the answer in a text, so that samples can vote.

Self-consistency needs answers that can be equal. Free text has no mode: where an extractor finds
nothing, there is no vote, and calibration is refused rather than run on noise.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...ir.errors import CalibrationError
from .wire import loads, value_at

Extractor = Callable[[str], str | None]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_CHOICE = re.compile(
    # nothing here may run over lines without end: models that go wrong write thousands of blanks
    r"(?:answer|option|choice)\s{0,9}(?:is|:)?\s{0,9}\*{0,9}\(?([A-J])\b"
    r"|^[^\w\n]*([A-J])[^\w\n]*$|\(([A-J])\)",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE = re.compile(r"```[\w+-]*\n(.*?)```", re.DOTALL)


def number(text: str) -> str | None:
    """The last number, canonical: ``18.0``, ``$18`` and ``18`` are one answer."""
    found = _NUMBER.findall(text)
    return canonical(found[-1]) if found else None


def canonical(text: str) -> str | None:
    """A number as text such that equal numbers are equal texts; ``None`` if it is none."""
    try:
        value = float(text.replace(",", "").replace("$", "").strip().rstrip("%"))
    except ValueError:
        return None
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return f"{value:.10g}" if value else "0"


def choice(text: str) -> str | None:
    """The last letter A to J that is named as an answer, stands alone or in brackets."""
    found = [a or b or c for a, b, c in _CHOICE.findall(text)]
    return found[-1].upper() if found else None


def boxed(text: str) -> str | None:
    r"""The contents of the last ``\boxed{...}``, braces balanced; numbers canonical."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for at in range(begin - 1, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0:
            inside = re.sub(r"\s+", "", text[begin:at])
            return canonical(inside) or inside or None
    return None


def code(text: str) -> str | None:
    """The last fenced block, white space and comments aside."""
    found = _FENCE.findall(text)
    if not found:
        return None
    lines = (re.sub(r"\s+", " ", line.split("#")[0]).strip() for line in found[-1].splitlines())
    return "\n".join(line for line in lines if line) or None


def json_field(path: str) -> Extractor:
    """A field of the last JSON object in the text; ``a.b`` goes into nested ones."""

    def extract(text: str) -> str | None:
        value = _last_object(text)
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                return None
            value = value[part]
        return json.dumps(value, sort_keys=True)

    return extract


def _last_object(text: str) -> Any:
    found, at = None, text.find("{")
    failures = 0
    while at >= 0 and failures < 200:  # each may read to the end of the text
        try:
            found, end = value_at(text, at)
        except ValueError:
            end, failures = at + 1, failures + 1
        at = text.find("{", end)
    return found


def pattern(expression: str) -> Extractor:
    """The last match of a regular expression: its first group, or all of it."""
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise CalibrationError(f"extractor regex {expression!r} is malformed: {error}") from error

    def extract(text: str) -> str | None:
        found = list(compiled.finditer(text))
        if not found:
            return None
        return found[-1].group(1) if compiled.groups else found[-1].group()

    return extract


_PLAIN: Mapping[str, Extractor] = {
    "number": number,
    "choice": choice,
    "boxed": boxed,
    "code": code,
}


def extractor(name: str) -> Extractor:
    """An extractor by name.

    Args:
        name: ``number``, ``choice``, ``boxed``, ``code``, ``json:FIELD`` or ``regex:PATTERN``.

    Raises:
        CalibrationError: Unknown, or a malformed expression.
    """
    kind, _, rest = name.partition(":")
    if kind == "json" and rest:
        return json_field(rest)
    if kind == "regex" and rest:
        return pattern(rest)
    if name in _PLAIN:
        return _PLAIN[name]
    raise CalibrationError(
        f"no extractor {name!r}: use {', '.join(_PLAIN)}, json:FIELD or regex:PATTERN"
    )


def answer_of(message: Mapping[str, Any], extract: Extractor) -> str | None:
    """The answer in a chat message. Calls of tools are one, whatever their ids and spacing."""
    if calls := message.get("tool_calls"):
        calls = calls if isinstance(calls, list) else [calls]
        return json.dumps([_call(c) for c in calls], sort_keys=True)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    return extract(content) if isinstance(content, str) else None


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    try:
        return [function.get("name"), loads(arguments or "{}")]
    except (ValueError, TypeError, AttributeError):
        return [function.get("name"), arguments]


def vote(answers: Sequence[str | None]) -> tuple[str | None, float]:
    """The mode and its share of all samples, those without an answer included.

    The first of equals wins, so the same samples give the same answer. ``(None, 0.0)`` if no
    sample has an answer.
    """
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        return None, 0.0
    answer, count = counts.most_common(1)[0]
    return answer, count / len(answers)
