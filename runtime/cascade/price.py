"""What tokens cost, and how many a request can have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
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
    """No fewer tokens than the prompt can have: a token is a byte at least, and images are few.

    Fields that skimp does not know count too: a schema of the response is part of the prompt.
    """
    size, waiting = 64, [v for k, v in request.items() if k not in ("model", "user")]
    waiting = [v for v in waiting if isinstance(v, str | dict | list)]
    while waiting:  # not a recursive function: callers choose how deep this goes
        value = waiting.pop()
        if isinstance(value, str):
            size += len(value.encode(errors="replace")) + 4
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            image = value.get("type") in _IMAGES
            size += sum(len(k) for k in value) + 4 + image * IMAGE_TOKENS
            waiting += [v for k, v in value.items() if not (image and k in _PICTURES)]
        else:
            size += 8
    return size


_IMAGES = ("image_url", "input_image", "image")
_PICTURES = ("image_url", "source", "image")


def prompts_in(request: Mapping[str, Any]) -> int:
    """How many prompts a plain completion holds; a list of numbers is one, in tokens."""
    prompt = request.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def answers_wanted(request: Mapping[str, Any]) -> int:
    """How many choices a request asks for."""
    n = request.get("n")
    return prompts_in(request) * (n if type(n) is int and n > 1 else 1)


def samples_billed(request: Mapping[str, Any], n: int) -> int:
    """How many completions may be billed where each prompt gets n samples or more."""
    asked = [v for k in ("n", "best_of") if type(v := request.get(k)) is int]
    return prompts_in(request) * max(n, *asked, 1)


def token_limit(request: Mapping[str, Any]) -> int | None:
    """The largest limit of tokens that a request sets: members differ in which they heed."""
    given = [v for k in TOKEN_LIMITS if type(v := request.get(k)) is int and v >= 0]
    return max(given) if given else None
