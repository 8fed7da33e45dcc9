"""Streams to the caller: a member's as it comes, or a finished answer in chunks."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from .accounts import Accounts
from .member import Chunk, MemberError, choice_message, to_json, usage_in
from .rows import Reservation
from .trip import Entry, Trip


class Relay:
    """A member's stream on its way to the caller, and what it has cost so far."""

    def __init__(
        self,
        accounts: Accounts,
        trip: Trip,
        entry: Entry,
        held: Reservation,
        request: dict[str, Any],
    ) -> None:
        self.accounts, self.trip, self.entry = accounts, trip, entry
        self.held, self.request = held, request
        self.begun = time.perf_counter()
        self.chunks = entry.member.stream(trip.query.kind, request)
        self.first: Chunk | None = None
        self.usage: dict[str, Any] | None = None
        self.deltas = 0
        self.characters = 0

    @property
    def path(self) -> str:
        """The route with this member at its end."""
        return ">".join(x for x in (self.trip.path, self.entry.name) if x)

    @property
    def delivered(self) -> int:
        """Tokens that came, if the member never says: a piece is one at least, and may be many."""
        return max(self.deltas, self.characters // 4)

    async def open(self) -> None:
        """Wait for the first chunk, so that a failure can still go elsewhere."""
        try:
            self.first = await anext(self.chunks, None)
            if self.first is None:
                raise MemberError("broken", "the stream was empty")
        except BaseException as error:
            await _close(self.chunks)
            member_error = error if isinstance(error, MemberError) else None
            kind = member_error.kind if member_error else _kind_of(error)
            self._settle(kind, member_error)
            raise

    async def relay(self) -> AsyncIterator[bytes]:
        """The data of the caller's events, without ``[DONE]``, which follows the last of them."""
        trip, status, error = self.trip, "ok", None
        try:
            left = self.accounts.timeout - (time.perf_counter() - trip.begun)
            deadline = asyncio.get_running_loop().time() + max(left, 0.1)
            chunk = self.first
            while chunk is not None:
                if data := self._look(chunk):
                    yield data
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(self.chunks, None)
        except MemberError as failed:
            status, error = failed.kind, failed
        except TimeoutError:
            status, error = "timeout", MemberError("timeout", "the request took too long")
        except BaseException as other:
            kind = _kind_of(other)
            self._record(kind, "disconnected" if kind == "cancelled" else "broken", None)
            raise
        finally:
            await _close(self.chunks)
        await self._record(status, "ok" if error is None else "broken", error)
        if error is not None:
            yield _error_data(error.message, error.kind)

    def _look(self, chunk: Chunk) -> bytes | None:
        """Take note of a chunk; what of it the caller should see."""
        usage = usage_in(chunk.data)
        if usage is not None:
            self.usage = usage
        choices = chunk.data.get("choices")
        if not isinstance(choices, list):
            return chunk.raw
        said = [n for c in choices if isinstance(c, dict) and (n := _characters(c))]
        self.deltas += len(said)
        self.characters += sum(said)
        if not choices and "usage" in chunk.data and not self.trip.query.wants_usage:
            return None
        return chunk.raw

    def _settle(self, kind: str, error: MemberError | None) -> None:
        self.accounts.settle(
            self.trip,
            self.entry,
            self.held,
            kind,
            self.begun,
            self.request,
            self.usage,
            self.delivered,
            error=error if self.deltas == 0 else None,
        )

    def _record(self, kind: str, status: str, error: MemberError | None) -> "asyncio.Future[None]":
        """Settle the attempt and finish the request."""
        self._settle(kind, error)
        usage = self.usage or {}
        self.trip.route.append(
            {
                "member": self.entry.name,
                "status": kind,
                "samples": 1,
                "confidence": None,
                "prompt_tokens": usage.get("prompt_tokens", 0),
                "completion_tokens": usage.get("completion_tokens", self.delivered),
                "cost": self.entry.price.of_usage(usage),
            }
        )
        return self.accounts.finish(self.trip, status)


async def in_chunks(body: dict[str, Any], trip: Trip) -> AsyncIterator[bytes]:
    """A finished answer in chunks."""
    chat = trip.query.kind == "chat/completions"
    keep = {k: body[k] for k in ("id", "created", "model", "system_fingerprint") if k in body}
    head: dict[str, Any] = keep | {"object": "chat.completion.chunk" if chat else "text_completion"}

    def chunk(**choice: Any) -> bytes:
        return to_json({**head, "choices": [{"index": 0, **choice}]})

    choice = body["choices"][0]
    if chat:
        message = dict(choice_message(choice))
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{"index": i, **c} for i, c in enumerate(calls)]
        yield chunk(delta=message, finish_reason=None)
        yield chunk(delta={}, finish_reason=choice.get("finish_reason"))
    else:
        yield chunk(text=choice.get("text"), finish_reason=choice.get("finish_reason"))
    if trip.query.wants_usage:
        yield to_json({**head, "choices": [], "usage": body.get("usage")})


def _characters(choice: Mapping[str, Any]) -> int:
    """Of what a piece says: text, calls of tools, thoughts under whatever name."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return len(str(choice.get("text") or ""))
    return sum(len(str(v)) for k, v in delta.items() if v and k != "role")


def _kind_of(error: BaseException) -> str:
    """A caller who went away cancels; anything else is a mistake in a member or in skimp."""
    return "error" if isinstance(error, Exception) else "cancelled"


async def _close(chunks: AsyncIterator[Chunk]) -> None:
    close = getattr(chunks, "aclose", None)
    if close is not None:
        await close()


def _error_data(message: str, kind: str) -> bytes:
    return to_json({"error": {"message": message, "type": "member_error", "code": kind}})
