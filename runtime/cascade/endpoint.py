"""A member behind an OpenAI-compatible URL."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import aiohttp

from .member import Chunk, Kind, MemberError, Reply, to_json
from .wire import loads

MOST_BYTES = 32 << 20
"""Of one reply; a member that sends more is cut off."""


class Endpoint:
    """An OpenAI-compatible server.

    Args:
        url: Up to and including ``/v1``.
        model: The name it knows the model by.
        key: Sent as a bearer token; never logged.
        timeout: Seconds for a whole reply, and between two chunks of a stream.
        batches: Whether the server honours ``n``.
        defaults: Fields for requests that do not have them, ``temperature`` for example.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        batches: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.timeout = timeout
        self.batches = batches
        self.defaults = dict(defaults or {})
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._session: aiohttp.ClientSession | None = None

    def _connect(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=20),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(10.0, self.timeout)),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _body(self, request: Mapping[str, Any], **more: Any) -> bytes:
        return to_json({**self.defaults, **request, "model": self.model, **more})

    async def complete(self, kind: Kind, request: Mapping[str, Any]) -> Reply:
        """Post a request; ``stream`` is taken out of it."""
        plain = {k: v for k, v in request.items() if k not in ("stream", "stream_options")}
        try:
            async with (
                asyncio.timeout(self.timeout),
                self._connect().post(
                    f"{self.url}/{kind}", data=self._body(plain), allow_redirects=False
                ) as response,
            ):
                raw = await _read(response)
                if response.status != 200:
                    raise _refused(response, raw)
        except TimeoutError:
            raise MemberError("timeout", f"no reply within {self.timeout:g} s") from None
        except aiohttp.ClientError as error:
            raise MemberError("connection", f"connection failed: {_short(error)}") from None
        return Reply(_parse(raw))

    async def stream(self, kind: Kind, request: Mapping[str, Any]) -> AsyncIterator[Chunk]:
        """Post a request with ``stream``, asking for usage at the end."""
        options = {**(request.get("stream_options") or {}), "include_usage": True}
        body = self._body(request, stream=True, stream_options=options)
        try:
            async with self._connect().post(
                f"{self.url}/{kind}",
                data=body,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(sock_connect=10.0, sock_read=self.timeout),
            ) as response:
                if response.status != 200:
                    raise _refused(response, await _read(response))
                async with aclosing(_events(response)) as events:
                    async for raw in events:
                        yield Chunk(_chunk(raw), raw)
        except TimeoutError:
            raise MemberError("timeout", f"nothing for {self.timeout:g} s") from None
        except aiohttp.ClientError as error:
            raise MemberError("connection", f"connection failed: {_short(error)}") from None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    if (response.content_length or 0) > MOST_BYTES:
        raise MemberError("too-large", f"a reply of {response.content_length} bytes")
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MOST_BYTES:
            raise MemberError("too-large", f"a reply of more than {MOST_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes]:
    """The data of server-sent events, until ``[DONE]``; a stream that just ends is broken."""
    rest, size = b"", 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MOST_BYTES:
            raise MemberError("too-large", f"a stream of more than {MOST_BYTES} bytes")
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield data
    raise MemberError("broken", "the stream ended before it was done")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = loads(raw)
    except ValueError:
        raise MemberError("malformed", "the reply is not JSON") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(c, dict) for c in choices)
    ):
        raise MemberError("malformed", "the reply has no choices")
    return dict(body)


def _chunk(raw: bytes) -> dict[str, Any]:
    try:
        data = loads(raw)
    except ValueError:
        raise MemberError("malformed", "a chunk is not JSON") from None
    if not isinstance(data, dict):
        raise MemberError("malformed", "a chunk is not an object")
    if "error" in data and "choices" not in data:
        raise MemberError("broken", "the member reported an error in its stream", body=data)
    return data


def _refused(response: aiohttp.ClientResponse, raw: bytes) -> MemberError:
    status = response.status
    if status < 400:  # a redirect, say: no error that a caller could do anything about
        return MemberError("malformed", f"the member answered {status}")
    try:
        body = loads(raw)
    except ValueError:
        body = None
    try:
        wait = float(response.headers.get("retry-after", ""))
    except ValueError:
        wait = None
    if wait is not None and not math.isfinite(wait):
        wait = None
    return MemberError(str(status), f"the member answered {status}", status, wait, body)


def _short(error: Exception) -> str:
    return type(error).__name__
