"""Errors as callers see them, in OpenAI's form."""

from fastapi import Response
from starlette.responses import JSONResponse

from .trip import UnavailableError


class Refused(Exception):
    """An error that a caller sees, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, code: str, kind: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.kind = status, message, code, kind

    def response(self, headers: dict[str, str] | None = None) -> Response:
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
