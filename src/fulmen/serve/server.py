"""An engine behind a socket, until somebody stops it."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from fulmen.serve.api.app import create_app
from fulmen.serve.api.images import MAX_IMAGES, ImageReader
from fulmen.serve.engine import Engine
from fulmen.serve.service import Service

LAST_RESORT = 5.0
"""Seconds that connections have to close once their answers are broken off."""


class _Server(uvicorn.Server):
    """On SIGTERM or SIGINT takes no more requests, and lets answers end for a while before it breaks them off.

    A second signal breaks them off at once. `signal` is the first one's number.
    """

    def __init__(self, app: FastAPI, service: Service, grace: float, when_ready: Callable[[], None]):
        super().__init__(uvicorn.Config(app, log_level="warning"))
        self._app, self._service, self._grace, self._when_ready = app, service, grace, when_ready
        self._loop = asyncio.get_running_loop()
        self._hurry = asyncio.Event()
        self.signal: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own, which takes SIGINT alone for a second signal, and raises all of them again in the end.
        if self.should_exit:
            self._loop.call_soon_threadsafe(self._hurry.set)
        self.should_exit, self.signal = True, self.signal or sig

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.stopping = True
        closing = asyncio.create_task(super().shutdown(sockets))
        hurrying = asyncio.create_task(self._break_off())
        await self._service.stop(self._grace)
        # All answers have ended by now; who still has not read them in a while does not keep the others.
        await asyncio.wait({closing}, timeout=LAST_RESORT)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await closing
        hurrying.cancel()

    async def _break_off(self) -> None:
        await self._hurry.wait()
        await self._service.stop(grace=0)


async def serve(
    engine: Engine,
    listening: socket.socket,
    *,
    model_name: str,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    max_images: int = MAX_IMAGES,
    allow_image_urls: bool = False,
    grace: float = 30.0,
    when_ready: Callable[[], None] = lambda: None,
) -> int | None:
    """Answer requests at a bound socket until SIGTERM or SIGINT, whose number it gives back.

    max_images: of a request, where the model takes any. allow_image_urls: whether images may be fetched from public
    addresses. grace: seconds that answers have to end then. when_ready: called when requests are taken.
    """
    engine.warm_up()
    images = None
    async with contextlib.AsyncExitStack() as stack:
        if engine.image_processor is not None:
            reader = ImageReader(
                engine.image_processor, engine.image_token, max_images=max_images, allow_urls=allow_image_urls
            )
            images = stack.enter_context(reader)
        service = await stack.enter_async_context(Service(engine))
        app = create_app(
            service,
            model_name=model_name,
            tokenizer=engine.tokenizer,
            images=images,
            api_key=api_key,
            cors_origins=cors_origins,
            render_metrics=service.metrics.render,
        )
        server = _Server(app, service, grace, when_ready)
        await server.serve([listening])
    return server.signal
