"""What the server needs of a model: complete a request, or stream it."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Kind = Literal["chat/completions", "completions"]
MOST_TOKENS = (1 << 31) - 1
"""Nobody's usage is larger; what claims to be was not counted, and no ledger could hold it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An OpenAI completion object, one choice per sample."""

    body: dict[str, Any]

    @property
    def usage(self) -> dict[str, Any] | None:
        """Tokens as the member reported them; ``None`` if it did not."""
        return usage_in(self.body)


@dataclass(slots=True)
class MemberError(Exception):
    """A member did not answer.

    Attributes:
        kind: ``timeout``, ``connection``, ``malformed``, ``too-large``, ``broken`` in mid-stream,
            or an HTTP status as text.
        message: What to tell the caller; no key and no prompt.
        status: The HTTP status, if there was one.
        retry_after: Seconds that the member asked to wait.
        body: The member's own error object, if it sent one.
    """

    kind: str
    message: str
    status: int | None = None
    retry_after: float | None = None
    body: Any = None

    def __str__(self) -> str:
        return self.message

    @property
    def passing(self) -> bool:
        """Whether trying again, or someone else, may help: not for what the request got wrong."""
        return (
            self.status is None
            or self.status in (401, 403, 404, 408, 409, 429)
            or (self.status >= 500)
        )

    @property
    def free(self) -> bool:
        """Whether it cost nothing: nobody charges for a refusal, or for what never arrived."""
        return self.status is not None or self.kind == "connection"

    @property
    def transient(self) -> bool:
        """Whether trying the same member again may help."""
        return self.kind in ("connection", "timeout") or (
            self.status is not None and (self.status in (408, 409, 429) or self.status >= 500)
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream: the JSON object, and the bytes it came as."""

    data: dict[str, Any]
    raw: bytes = field(default=b"")

    @classmethod
    def of(cls, data: dict[str, Any]) -> "Chunk":
        """From an object, for members that have no bytes of their own."""
        return cls(data, to_json(data))


async def pause(error: MemberError, tries: int) -> None:
    """Wait before trying again: as long as was asked for, at most two seconds."""
    wait = error.retry_after if error.retry_after is not None else 0.1 * 2**tries
    await asyncio.sleep(min(max(wait, 0.0), 2.0) * random.uniform(0.5, 1.0))


class Member(Protocol):
    """A model that answers OpenAI requests.

    ``batches`` says whether one call with ``n`` gives n samples; otherwise the caller calls n
    times. Both methods raise :class:`MemberError` and nothing else, and stop their work when the
    task they run in is cancelled, or the iterator closed.
    """

    @property
    def batches(self) -> bool:
        """See the class."""

    async def complete(self, kind: Kind, request: Mapping[str, Any]) -> Reply:
        """The whole answer."""

    def stream(self, kind: Kind, request: Mapping[str, Any]) -> AsyncIterator[Chunk]:
        """The answer in chunks, the last of them with ``usage`` if the member reports it."""

    async def close(self) -> None:
        """Give back connections or memory."""


def to_json(value: Any) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which UTF-8 cannot hold, is escaped as it came."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def usage_in(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """A usable ``usage`` of a completion or a chunk, else ``None``."""
    usage = body.get("usage")
    names = ("prompt_tokens", "completion_tokens")
    if not isinstance(usage, dict) or not any(name in usage for name in names):
        return None
    for name in names:
        value = usage.get(name, 0)
        if type(value) is not int or not 0 <= value <= MOST_TOKENS:
            return None
    return usage


def choice_message(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The message of a choice, of a chat or of a plain completion."""
    message = choice.get("message")
    if isinstance(message, dict):
        return message
    return {"content": choice.get("text")}
