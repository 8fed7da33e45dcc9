"""Server-sent events, and callers who hang up."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from .refused import where
from .rows import LedgerError
from .trip import Answer

log = logging.getLogger("skimp.serve")


class Events(Response):
    """Server-sent events. A caller who goes away ends the member's work at once.

    Args:
        answer: With a stream.
        done: Called when it is over.
        limit: Seconds until a caller who does not read what was sent is given up.
    """

    def __init__(self, answer: Answer, done: Callable[[], None], limit: float) -> None:
        super().__init__(
            headers={**answer.headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._stream, self._report = answer.stream, answer.report
        self._done, self._limit, self._begun = done, limit, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the stream or the caller ends."""
        body = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait(
                {body, gone}, timeout=self._limit, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for task in (body, gone):
                task.cancel()
            error, _ = await asyncio.gather(body, gone, return_exceptions=True)
            self._done()
        if isinstance(error, Exception):
            await self._break(send, error)

    async def _send(self, send: Send) -> None:
        assert self._stream is not None
        stream: Any = self._stream
        async with contextlib.aclosing(stream):
            async for data in stream:
                await self._begin(send)
                await send(_part(b"data: " + data + b"\n\n"))
        await self._begin(send)
        if self._report is not None:  # as a comment, which clients of OpenAI's API skip
            await send(_part(b": skimp " + json.dumps(self._report()).encode() + b"\n\n"))
        await send(_part(b"data: [DONE]\n\n", more=False))

    async def _begin(self, send: Send) -> None:
        """Send the headers, once."""
        if not self._begun:
            self._begun = True
            head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(head)

    async def _break(self, send: Send, error: Exception) -> None:
        """End a stream that went wrong with an error: a caller must not take it for a whole one."""
        known = isinstance(error, LedgerError)
        log.error(json.dumps({"event": "stream", "error": str(error) if known else where(error)}))
        text = "the ledger cannot be written" if known else "the server made a mistake"
        data = {"message": text, "type": "server_error", "code": "ledger" if known else "internal"}
        await self._begin(send)
        await send(_part(b"data: " + json.dumps({"error": data}).encode() + b"\n\n", more=False))


def _part(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Any) -> Answer | None:
    """Do the work, unless the caller hangs up before it is done; then stop it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            answer: Answer = task.result()
            return answer
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None
    finally:
        task.cancel()  # nothing happens to one that is done
        gone.cancel()
