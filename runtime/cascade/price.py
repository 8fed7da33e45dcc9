"""What tokens cost, and how many a request can have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMAGE_TOKENS = 2000
"""Reserved for an image, whose bytes say little of its tokens."""


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens.

    Attributes:
        input: Per million prompt tokens.
        output: Per million completion tokens.
    """

    input: float
    output: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """US dollars of a call."""
        return (prompt_tokens * self.input + completion_tokens * self.output) * 1e-6

    def of_usage(self, usage: Mapping[str, Any]) -> float:
        """US dollars of a call from an OpenAI ``usage`` object."""
        return self.of(int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))


def most_prompt_tokens(request: Mapping[str, Any]) -> int:
    """No fewer tokens than the prompt can have: a token is a byte at least, and images are few."""
    return 64 + sum(_bytes(request.get(k)) for k in ("messages", "prompt", "tools", "functions"))


def _bytes(value: Any) -> int:
    if isinstance(value, str):
        return IMAGE_TOKENS if value.startswith("data:") else len(value.encode()) + 4
    if isinstance(value, dict):
        return sum(len(str(k)) + _bytes(v) for k, v in value.items()) + 4
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return 8
