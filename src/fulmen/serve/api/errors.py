"""Errors of the HTTP API, all in the shape of OpenAI's: {"error": {"message", "type", "param", "code"}}."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from fulmen.config import UserError
from fulmen.serve.types import QueueFull

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""The type of an error by its status; others are invalid requests below 500 and server errors from there on."""


MAX_MESSAGE = 500
"""Characters of an error's message."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None  # the field that is wrong, as `messages[0].content`
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorDetail


class ApiError(HTTPException):
    """An answer with an error's status. What raises it may be any part of a request, middleware too."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, _shown(message), headers=None if headers is None else dict(headers))
        self.param, self.code = None if param is None else _shown(param), code

    def body(self) -> dict[str, Any]:
        return error_body(self.status_code, self.detail, self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def stopping(retry_after: int = 5) -> ApiError:
    """Whoever asks while the server is not ready, or is about to leave, may ask again."""
    headers = {"Retry-After": str(retry_after)}
    return ApiError(503, "the server is starting or stopping; try again", code="not_ready", headers=headers)


def failure(message: str = "the server has failed; its log says why") -> ApiError:
    """Something that is not the client's fault and of which it is told nothing else."""
    return ApiError(500, message, code="internal_error")


@contextlib.contextmanager
def blaming(param: str) -> Iterator[None]:
    """Let a UserError be an ApiError (400) that names this field."""
    try:
        yield
    except UserError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from None


def add_handlers(app: FastAPI) -> None:
    """Let the application answer with this module's shape, whatever is raised."""

    @app.exception_handler(StarletteHTTPException)
    async def _http(_: Request, error: StarletteHTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):
            error = ApiError(error.status_code, str(error.detail), headers=error.headers)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return invalid_request(error.errors(), error.body).response()

    @app.exception_handler(UserError)
    async def _user(_: Request, error: UserError) -> JSONResponse:
        return ApiError(400, str(error)).response()

    @app.exception_handler(QueueFull)
    async def _full(_: Request, error: QueueFull) -> JSONResponse:
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after)}).response()


def invalid_request(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """The status 400 that says which field is wrong; of several fields the first of those that lie deepest.

    errors: of pydantic, whose places begin with "body". A value that fits none of several types has an error for each.
    """
    if not isinstance(body, dict):
        return ApiError(400, "the body must be a JSON object, with the header content-type: application/json")
    # That a value is of another type says least: it may be of one of the others and wrong there.
    errors = [error for error in errors if not error["type"].endswith("_type")] or errors
    placed = [(_place(error, body), error) for error in errors]
    place = max((place for place, _ in placed), key=len)
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".") or None
    here = [error for other, error in placed if other == place]
    if any(error["type"] == "extra_forbidden" for error in here):
        return ApiError(400, f"{param} is not a field that this server knows", param=param, code="unknown_parameter")
    reasons = list(dict.fromkeys(error["msg"] for error in here))
    return ApiError(400, f"{param or 'the body'}: {'; or '.join(reasons)}", param=param, code="invalid_value")


def _shown(text: str) -> str:
    """Text that may hold what a client sent: not too long, and without what UTF-8 cannot hold."""
    text = text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."
    return text.encode(errors="backslashreplace").decode()


def _place(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where in the body an error is. Pydantic's own place also names the alternatives of types that it tried."""
    value, place = body, []
    parts = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
    for number, part in enumerate(parts):
        try:
            value = value[part]
        except (LookupError, TypeError):
            is_missing = error["type"] == "missing" and number == len(parts) - 1
            if not is_missing:
                continue
        place.append(part)
    # Fields that do not fit each other are an error of all of them; it says itself which it is about.
    named = error.get("ctx", {}).get("param")
    return (*place, *([named] if named else []))
