"""Errors as callers see them, in OpenAI's form, and the requests that are refused at once."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from .member import MOST_TOKENS, Kind
from .trip import UnavailableError
from .wire import loads

log = logging.getLogger("skimp.serve")
MOST_SAMPLES = 128


class Refused(Exception):
    """An error that a caller sees, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, code: str, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.kind = status, message, code, kind

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """As a response."""
        error = {"message": self.message, "type": self.kind, "param": None, "code": self.code}
        return JSONResponse({"error": error}, self.status, headers)


def unavailable(error: UnavailableError) -> tuple[Response, str]:
    """What a caller sees when nobody answered: the member's own refusal, if that was it."""
    cause = error.cause
    if cause is None:
        return Refused(504, str(error), "timeout", "server_error").response(), "timeout"
    if cause.status is not None and not cause.passing and isinstance(cause.body, dict):
        return JSONResponse(cause.body, cause.status), cause.kind
    if cause.status == 429:
        status, text = 429, "every member is out of capacity"
    else:
        status = 504 if cause.kind == "timeout" else 502
        text = f"no member answered; the last: {cause.message}"
    return Refused(status, text, cause.kind, "server_error").response(), cause.kind


def parse(raw: bytes) -> dict[str, Any]:
    """The body of a request.

    Raises:
        Refused: It is no JSON object, or one that no member could be sent.
    """
    try:
        body = loads(raw, _no_constant)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}", "bad_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object", "bad_json")
    return body


def check(body: dict[str, Any], kind: Kind) -> None:
    """Refuse fields that skimp counts on and cannot read; others are the member's business.

    Numbers such as 2.0, which JSON does not tell from 2, become whole in the body.

    A limit of tokens that members take for none, or a number of samples that they read from text,
    would cost more than was reserved.

    Raises:
        Refused: Says which field.
    """
    wanted = "messages" if kind == "chat/completions" else "prompt"
    given = body.get(wanted)
    if not given or (wanted == "messages" and not isinstance(given, list)):
        raise Refused(400, f"`{wanted}` is missing or empty", "missing_field")
    if not isinstance(body.get("stream"), bool | None):
        raise Refused(400, "`stream` is neither true nor false", "bad_field")
    if not isinstance(body.get("stream_options"), dict | None):
        raise Refused(400, "`stream_options` is not an object", "bad_field")
    limits = {"n": (1, MOST_SAMPLES), "best_of": (1, MOST_SAMPLES)}
    least = int(kind == "chat/completions")  # 0 asks a plain completion for the prompt's scores
    limits |= dict.fromkeys(("max_tokens", "max_completion_tokens"), (least, MOST_TOKENS))
    for name, (low, high) in limits.items():
        value = body.get(name)
        if isinstance(value, float) and value.is_integer():
            value = body[name] = int(value)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise Refused(400, f"`{name}` is not a whole number from {low} to {high}", "bad_field")


def handle_errors(app: FastAPI) -> None:
    """Make the framework's own errors look like all others."""

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
        return Refused(error.status_code, str(error.detail), code).response(error.headers)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> Response:
        return failed(error)


def failed(error: Exception) -> Response:
    """A mistake of skimp's: its kind goes into the log, for the message may hold a prompt."""
    log.error(json.dumps({"event": "error", "error": where(error)}))
    return Refused(500, "the server made a mistake", "internal", "server_error").response()


def where(error: BaseException) -> str:
    """The kind of an error and the line that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return type(error).__name__
    return f"{type(error).__name__} at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not in JSON")
