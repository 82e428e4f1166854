"""An engine behind a socket, until somebody stops it."""

import asyncio
import socket
from collections.abc import Callable, Sequence

import uvicorn
from fastapi import FastAPI

from fulmen.serve.api.app import create_app
from fulmen.serve.engine import Engine
from fulmen.serve.params import SamplingParams
from fulmen.serve.service import Service

LAST_RESORT = 5.0
"""Seconds that connections have to close once their answers are broken off."""


class _Server(uvicorn.Server):
    """On SIGTERM or SIGINT takes no more requests, and lets answers end for a while before it breaks them off."""

    def __init__(self, app: FastAPI, service: Service, grace: float, when_ready: Callable[[], None]):
        wait = int(grace + LAST_RESORT) + 1
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=wait))
        self._app, self._service, self._grace, self._when_ready = app, service, grace, when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.stopping = True
        stopping = asyncio.create_task(self._service.stop(self._grace))
        await super().shutdown(sockets)
        await stopping


async def serve(
    engine: Engine,
    listening: socket.socket,
    *,
    model_name: str,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    grace: float = 30.0,
    when_ready: Callable[[], None] = lambda: None,
) -> None:
    """Answer requests at a bound socket until SIGTERM or SIGINT.

    grace: seconds that answers have to end then. when_ready: called when requests are taken.
    """
    # What is built or recorded at the first step need not be waited for by the first client.
    engine.generate([[0] * 2], SamplingParams(max_tokens=3, ignore_eos=True))
    async with Service(engine) as service:
        app = create_app(
            service,
            model_name=model_name,
            tokenizer=engine.tokenizer,
            api_key=api_key,
            cors_origins=cors_origins,
            render_metrics=service.metrics.render,
        )
        await _Server(app, service, grace, when_ready).serve([listening])
