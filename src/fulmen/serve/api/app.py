"""The HTTP API: OpenAI's routes, and beside them tokens, health, metrics and a page to chat on."""

import base64
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, PlainTextResponse

from fulmen.data import Tokenizer
from fulmen.serve.api.answering import AnswersPrompts, Api
from fulmen.serve.api.chat import chat_prompt, chat_routes
from fulmen.serve.api.completions import completion_routes, encode_text
from fulmen.serve.api.errors import ApiError, ErrorReply, add_handlers, stopping
from fulmen.serve.api.images import ImageReader
from fulmen.serve.api.limits import MAX_BODY, MAX_IMAGE_BODY, ApiKey, BodyLimit, Guard, HttpCounts, JsonRoute
from fulmen.serve.api.protocol import DetokenizeRequest, TokenizeRequest
from fulmen.serve.api.replies import Health, ModelCard, ModelList, Text, Tokens

REASONS = {
    400: "The request is not one that this server takes; `param` names the field",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    408: "The body comes too slowly",
    413: "The body is too large",
    429: "Too many requests wait, or too many large ones are here",
    500: "The server has failed",
    503: "The server is starting or stopping",
    504: "The answer took too long",
}


def create_app(
    service: AnswersPrompts,
    *,
    model_name: str,
    tokenizer: Tokenizer,
    aliases: Iterable[str] = (),
    images: ImageReader | None = None,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    max_body: int | None = None,
    request_timeout: float | None = None,
    render_metrics: Callable[[], bytes] | None = None,
    lifespan: Callable[[FastAPI], Any] | None = None,
) -> FastAPI:
    """The application that serves one model.

    images: reads those of messages; None if the model takes none. api_key: what all routes but `/` and `/health` then
    ask for. cors_origins: whose pages in a browser may use it. max_body: bytes, as the model needs them unless given.
    request_timeout: seconds from the request to the end of its answer. render_metrics: gives the
    service's metrics in Prometheus' text form. `app.state.stopping = True` lets new requests be refused with 503.
    """
    app = FastAPI(title="fulmen", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.stopping = False
    app.router.redirect_slashes = False
    api = Api(
        service=service,
        tokenizer=tokenizer,
        model_name=model_name,
        aliases=frozenset(aliases),
        images=images,
        request_timeout=request_timeout,
    )
    counts = HttpCounts()
    add_handlers(app)
    failures = _errors(400, 408, 413, 500, 503, *([401] if api_key else []))
    app.include_router(chat_routes(api), responses=failures | _errors(404, 429, 504))
    app.include_router(completion_routes(api), responses=failures | _errors(404, 429, 504))
    app.include_router(_token_routes(api), responses=failures | _errors(404, 429))
    app.include_router(_model_routes(api), responses=_errors(500, *([401] if api_key else [])))
    app.include_router(_state_routes(api, counts, render_metrics), responses=_errors(500))
    # The last that is added is the first that sees a request.
    most = MAX_BODY if images is None else MAX_IMAGE_BODY
    app.add_middleware(BodyLimit, limit=most if max_body is None else max_body)
    if api_key:
        app.add_middleware(ApiKey, key=api_key)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Guard, counts=counts)
    _correct_document(app, has_key=bool(api_key))
    return app


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorReply, "description": REASONS[status]} for status in statuses}


def _model_routes(api: Api) -> APIRouter:
    router, created = APIRouter(), int(time.time())

    def card() -> ModelCard:
        fixed = {"object": "model", "created": created, "owned_by": "fulmen"}
        limits = {
            "max_model_len": api.service.max_context,
            "max_images": 0 if api.images is None else api.images.max_images,
        }
        return ModelCard(id=api.model_name, **fixed, **limits)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The one model that is served."""
        return ModelList(object="list", data=[card()])

    # Names of models may hold slashes.
    @router.get("/v1/models/{model:path}", responses=_errors(404))
    async def get_model(model: str) -> ModelCard:
        """The model of this name, which may be an alias."""
        api.check_model(model)
        return card()

    return router


def _token_routes(api: Api) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    async def encode(body: TokenizeRequest, request: Request) -> list[int]:
        if body.prompt is None:
            generate = body.add_generation_prompt
            async with chat_prompt(api, request, body.messages, body.tools or [], generate=generate) as prompt:
                return prompt.tokens
        if body.add_special_tokens:
            return await run_in_threadpool(encode_text, api.tokenizer, body.prompt)
        return await run_in_threadpool(api.tokenizer.encode, body.prompt)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
        """The token ids that a prompt or a chat becomes, with one in each position of an image."""
        api.check(request, body.model)
        tokens = await encode(body, request)
        return Tokens(tokens=tokens, count=len(tokens), max_model_len=api.service.max_context)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, request: Request) -> Text:
        """The text of token ids, names of special tokens included."""
        api.check(request, body.model)
        size = api.tokenizer.vocab_size
        if any(token >= size for token in body.tokens):
            message = f"tokens: the tokenizer's are 0 to {size - 1}"
            raise ApiError(400, message, param="tokens", code="invalid_value")
        return Text(prompt=await run_in_threadpool(api.tokenizer.decode, body.tokens, skip_special=False))

    return router


def _state_routes(api: Api, counts: HttpCounts, render_metrics: Callable[[], bytes] | None) -> APIRouter:
    router = APIRouter()
    page, policy = _page()

    @router.get("/health", responses=_errors(503))
    async def health(request: Request) -> Health:
        """200 while requests are taken."""
        if request.app.state.stopping or not api.service.ready:
            raise stopping()
        return Health(status="ok")

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        from prometheus_client import CONTENT_TYPE_LATEST

        service = b"" if render_metrics is None else render_metrics()
        return Response(counts.render() + service, media_type=CONTENT_TYPE_LATEST)

    @router.get("/", response_class=HTMLResponse)
    async def chat_page() -> Response:
        """A page to chat on."""
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
        return HTMLResponse(page, headers=headers)

    return router


def _page() -> tuple[str, str]:
    """The chat page, and the policy by which a browser runs its own script and nothing else, and asks no other host."""
    page = files("fulmen.serve.api").joinpath("page.html").read_text(encoding="utf-8")
    sources = {}
    for tag in ("style", "script"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        sources[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    allowed = "".join(f"{tag}-src 'sha256-{digest}'; " for tag, digest in sources.items())
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return page, f"default-src 'none'; {allowed}{rest}"


def _correct_document(app: FastAPI, has_key: bool) -> None:
    """Let the OpenAPI document say what this application answers: 400 for invalid requests, where FastAPI has 422."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            operations = [operation for path in document["paths"].values() for operation in path.values()]
            for operation in operations:
                operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document.get("components", {}).get("schemas", {}).pop(name, None)
            if has_key:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path, operations in document["paths"].items():
                    if path not in ("/", "/health"):
                        for operation in operations.values():
                            operation["security"] = [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi
