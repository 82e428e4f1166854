"""What the HTTP API lets in: size, keys and JSON of a bounded kind; and what it counts. Plain ASGI, no framework."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fulmen.serve.api.errors import ApiError, failure

LOG = logging.getLogger(__name__)

MAX_BODY = 8 * 1024 * 1024
"""Bytes of a request's body, without those of its images."""
MAX_IMAGE_BODY = 64 * 1024 * 1024
"""Bytes of a body, images included, where the model takes them."""
MAX_BODIES = 512 * 1024 * 1024
"""Bytes of all large bodies together; each lies in memory until its request's answer begins."""
SMALL_BODY = 1024 * 1024
"""Bytes of a body that is always taken, whatever others fill."""
BODY_SECONDS = 60.0
"""From the beginning of a request until all of its body is here."""
DATA_URL = re.compile(rb'"data:image/[^"]{1000,}"', re.IGNORECASE)
"""What may be an image, roughly. Shorter ones count as text: millions of them would take seconds to find."""
MAX_NESTING = 100
"""Objects and lists within each other in a request's JSON."""
MAX_DIGITS = 20
"""Of a whole number in a request's JSON, sign included."""
OPEN_PATHS = frozenset({"/", "/health"})
"""Paths that need no key: the page, which asks for it, and what a load balancer looks at."""
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})


class BodyLimit:
    """Refuses bodies of more than so many bytes with 413, as soon as that is known and without reading the rest.

    So it does with 429 while the large ones of all requests together have more than `together`, and with 408 where one
    is not here within so many seconds.
    """

    def __init__(self, app: ASGIApp, limit: int, together: int = MAX_BODIES, seconds: float = BODY_SECONDS):
        self._app, self._limit, self._together, self._seconds = app, limit, together, seconds
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._is_announced_too_large(scope):
            await self._error().response()(scope, receive, send)
            return
        body = _Body(asyncio.get_running_loop().time() + self._seconds)

        async def limited() -> Message:
            message = await self._receive(receive, body)
            if message["type"] == "http.request":
                self._take(body, len(message.get("body", b"")))
            return message

        async def counted(message: Message) -> None:
            # Whoever answers has done with the body, however long the client takes to read the answer.
            self._let_go(body)
            await send(message)

        try:
            await self._app(scope, limited, counted)
        finally:
            self._let_go(body)

    async def _receive(self, receive: Receive, body: "_Body") -> Message:
        try:
            async with asyncio.timeout_at(body.deadline):
                message = await receive()
        except TimeoutError:
            raise self._late() from None
        if not message.get("more_body", False):
            body.deadline = None
        return message

    def _take(self, body: "_Body", size: int) -> None:
        body.seen += size
        if body.seen > self._limit:
            raise self._error()
        if body.seen > SMALL_BODY:
            self._held += body.seen - body.held
            body.held = body.seen
            if self._held > self._together:
                raise self._full()

    def _let_go(self, body: "_Body") -> None:
        self._held -= body.held
        body.held = 0

    def _is_announced_too_large(self, scope: Scope) -> bool:
        length = dict(scope["headers"]).get(b"content-length", b"")
        # A number of more digits than this is larger than any limit, and Python need not read it.
        return length.isdigit() and (len(length) > MAX_DIGITS or int(length) > self._limit)

    def _error(self) -> ApiError:
        message = f"the body has more than the {self._limit} bytes that this server takes"
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})

    def _late(self) -> ApiError:
        message = f"the body was not here within {self._seconds:g} s"
        return ApiError(408, message, code="body_too_slow", headers={"Connection": "close"})

    def _full(self) -> ApiError:
        message = f"there are many large requests; try again, or send a body of less than {SMALL_BODY} bytes"
        headers = {"Connection": "close", "Retry-After": "1"}
        return ApiError(429, message, code="bodies_full", headers=headers)


@dataclass
class _Body:
    """One that comes in."""

    deadline: float | None  # by the event loop's clock; None: all of it is here
    seen: int = 0  # bytes
    held: int = 0  # bytes of it that are counted among all large ones


class ApiKey:
    """Refuses with 401 whoever does not send `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._digest = app, _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_right(scope):
            await self._app(scope, receive, send)
            return
        message = "this server needs its API key: send the header Authorization: Bearer KEY"
        error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await error.response()(scope, receive, send)

    def _is_right(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        # Digests have one length, so that the time says nothing of the key's.
        return hmac.compare_digest(_digest(key.strip()), self._digest) and scheme.lower() == b"bearer"


class Guard:
    """Outermost: counts requests, and turns what nobody caught into a 500 and lines in the log."""

    def __init__(self, app: ASGIApp, counts: "HttpCounts"):
        self._app, self._counts = app, counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._counts.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, watched)
            except Exception:
                LOG.exception("%s %s has failed", scope["method"], scope["path"])
                if status:
                    raise  # half an answer is out; only closing the connection tells the client
                await failure().response()(scope, receive, watched)
            finally:
                self._counts.count(scope, status)


class HttpCounts:
    """Requests by route, method and status."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge

        self.registry = CollectorRegistry()
        names = ("route", "method", "status")
        self._requests = Counter("fulmen_http_requests", "HTTP requests answered", names, registry=self.registry)
        self.in_flight = Gauge("fulmen_http_requests_in_flight", "HTTP requests at work", registry=self.registry)

    def count(self, scope: Scope, status: int) -> None:
        """One that has ended; 0 is the status of one whose client left before there was an answer."""
        # Clients choose paths and methods freely; what they make up must not become labels.
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()

    def render(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_strictly


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        return await run_in_threadpool(_read_body, body) if len(body) > SMALL_BODY else _read_body(body)


def _read_body(body: bytes) -> Any:
    # First roughly: short values take many times their size in memory, strings do not.
    if len(body) > MAX_BODY:
        _check_rest(len(body) - sum(url.end() - url.start() for url in DATA_URL.finditer(body)))
    value = read_json(body)
    if len(body) > MAX_BODY:
        _check_rest(len(body) - _image_bytes(value))
    return value


def _check_rest(size: int) -> None:
    if size > MAX_BODY:
        message = f"without images, the body has more than the {MAX_BODY} bytes that this server takes"
        raise ApiError(413, message, code="body_too_large")


def _image_bytes(body: Any) -> int:
    """Of the images in a chat, as far as it is one."""
    try:
        contents = [message.get("content") for message in body["messages"]]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return sum(len(part["image_url"]["url"]) for part in parts if "image_url" in part)
    except (LookupError, TypeError, AttributeError):
        return 0


def read_json(body: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises ApiError (400) for what is neither, for NaN, infinities and numbers too large, and for deep nesting.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from None
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=_whole, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    if _is_deeper(value, MAX_NESTING):
        raise _too_deep()
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether it has more levels of objects and lists. Level by level, so that no depth is too much for it."""
    level = [value]
    for _ in range(limit + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return True


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested too deeply: at most {MAX_NESTING} levels", code="invalid_json")


def _refuse(constant: str) -> float:
    raise ApiError(400, f"the body holds {constant}, which is not JSON", code="invalid_json")


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ApiError(400, f"the body holds a number of {len(digits)} digits", code="invalid_json")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ApiError(400, "the body holds a number that is too large", code="invalid_json")
    return value


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
