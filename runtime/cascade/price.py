"""What tokens cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
