"""Server-sent events, and callers who hang up."""

import asyncio
import contextlib
import json
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from .trip import Answer


class Events(Response):
    """Server-sent events. A caller who goes away ends the member's work at once."""

    def __init__(self, answer: Answer, done: Any) -> None:
        super().__init__(
            headers={**answer.headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._stream, self._report, self._done = answer.stream, answer.report, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the stream or the caller ends."""
        body = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({body, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (body, gone):
                task.cancel()
            await asyncio.gather(body, gone, return_exceptions=True)
            self._done()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        assert self._stream is not None
        stream: Any = self._stream
        async with contextlib.aclosing(stream):
            started = False
            async for data in stream:
                if not started:
                    await send(head)
                    started = True
                await send(_part(b"data: " + data + b"\n\n"))
            if not started:
                await send(head)
        if self._report is not None:  # as a comment, which clients of OpenAI's API skip
            await send(_part(b": skimp " + json.dumps(self._report()).encode() + b"\n\n"))
        await send(_part(b"data: [DONE]\n\n", more=False))


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
