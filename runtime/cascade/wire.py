"""JSON that came over the network."""

import json
import re
from collections.abc import Callable
from typing import Any

MOST_DEPTH = 100
# to the end of the text where it is not closed: each quote is looked at once, whatever a text holds
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_ALIKE = bytes.maketrans(b"{}", b"[]")
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_OPENS = ord("[")


def loads(raw: str | bytes, constant: Callable[[str], Any] | None = None) -> Any:
    """The value of a text.

    Nesting is looked at before anything is parsed: Python's parser recurses, and what the garbage
    collector happens to finish at the recursion limit fails.

    Args:
        raw: UTF-8.
        constant: Called for NaN and the infinities, which JSON does not have.

    Raises:
        ValueError: It is no JSON, or nested more than :data:`MOST_DEPTH` deep.
    """
    text = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if text.count(b"[") + text.count(b"{") > MOST_DEPTH and _deep(text):
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep, or not closed")
    return json.loads(text.decode("utf-8-sig", "surrogatepass"), parse_constant=constant)


def value_at(text: str, at: int) -> tuple[Any, int]:
    """The object or list that begins at a place of a text, and where it ends.

    Args:
        text: Whatever a model wrote.
        at: Of a bracket.

    Raises:
        ValueError: No JSON begins there, or it is nested more than :data:`MOST_DEPTH` deep.
    """
    if text.count("[", at) + text.count("{", at) > MOST_DEPTH:
        depth = 0  # what follows the value is no JSON, so brackets are counted up to its end
        for bracket in _brackets(text[at:].encode("utf-8", "surrogatepass")):
            depth += 1 if bracket == _OPENS else -1
            if depth > MOST_DEPTH:
                raise ValueError(f"it is nested more than {MOST_DEPTH} deep, or not closed")
            if depth == 0:
                break
    found, end = json.JSONDecoder().raw_decode(text, at)
    return found, end


def _brackets(text: bytes) -> bytes:
    """Of all that lies outside strings, square for curly ones."""
    return _STRING.sub(b"", text).translate(_ALIKE, _OTHERS)


def _deep(text: bytes) -> bool:
    """Whether brackets are left after so many rounds, each of which takes the innermost away."""
    brackets = _brackets(text)
    for _ in range(MOST_DEPTH):
        before, brackets = len(brackets), brackets.replace(b"[]", b"")
        if len(brackets) == before:
            break
    return bool(brackets)
