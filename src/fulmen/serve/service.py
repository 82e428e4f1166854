"""The asyncio side of an engine, which runs in a thread of its own."""

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import Sequence

from fulmen.run.threads import release_openmp_threads
from fulmen.serve.engine import Engine
from fulmen.serve.metrics import Metrics
from fulmen.serve.prompt import Prompt
from fulmen.serve.sampling import SamplingParams
from fulmen.serve.types import Piece, QueueFull

LOG = logging.getLogger(__name__)


class Answers:
    """The pieces of a request's answers as they come; `aclose` ends it early and frees its memory."""

    def __init__(self, service: "Service", request: int, count: int, pixels: int):
        self._service, self._request, self._awaited = service, request, count
        self.pixels = pixels  # bytes, let go when all answers have ended
        self.open = set(range(count))  # answers whose last piece is not here yet
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> Piece:
        if not self._awaited:
            raise StopAsyncIteration
        try:
            piece = await self._pieces.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._awaited -= piece.reason is not None
        return piece

    async def aclose(self) -> None:
        """Whoever waited has left; nothing happens if all has come."""
        if self._awaited:
            self._awaited = 0
            self._service._leave(self._request)

    def put(self, piece: Piece) -> None:
        if piece.reason is not None:
            self.open.remove(piece.index)
        self._pieces.put_nowait(piece)


class Service:
    """One engine for all requests of a process. Use it as an async context manager."""

    def __init__(self, engine: Engine):
        self.engine, self.metrics = engine, Metrics(engine)
        self.ready = False
        self._answers: dict[int, Answers] = {}
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._idle = asyncio.Event()
        self._idle.set()
        self._begun: set[int] = set()  # requests that have had a piece

    @property
    def max_context(self) -> int:
        """Tokens of a prompt and its answer, at most."""
        return self.engine.plan.max_context

    @property
    def pixels(self) -> int:
        """Bytes of the pixels that requests hold here; who takes images in decides how many are too many."""
        return sum(answers.pixels for answers in self._answers.values())

    async def __aenter__(self) -> "Service":
        self._loop = asyncio.get_running_loop()
        release_openmp_threads()  # this thread may have computed before, and the engine's does from now on
        self._thread.start()
        self.ready = True
        return self

    async def __aexit__(self, *error) -> None:
        await self.stop(grace=0)

    def stream(self, prompt: Prompt | Sequence[int], params: SamplingParams) -> Answers:
        """The answers to a prompt, of the event loop that the service was entered in.

        Raises UserError for what can never be served, QueueFull where too many wait.
        """
        prompt = Prompt.of(prompt)
        self.engine.check(prompt, params)
        waiting = len(self._answers) - len(self._begun)
        if not self.ready or waiting >= self.engine.settings.max_waiting + self.engine.plan.slots:
            raise QueueFull(retry_after=1 + waiting // max(1, self.engine.plan.slots))
        request = next(self._numbers)
        pixels = sum(placed.image.crops.nbytes for placed in prompt.images)
        answers = self._answers[request] = Answers(self, request, params.n, pixels)
        self.metrics.begin(request)
        self._idle.clear()
        self._inbox.put((request, prompt, params))
        return answers

    async def stop(self, grace: float) -> None:
        """Take no more requests, end those that run within `grace` seconds, then break off the others."""
        self.ready = False
        try:
            await asyncio.wait_for(self._idle.wait(), grace or 0.001)
        except TimeoutError:
            LOG.warning("stopping: %d requests are broken off", len(self._answers))
            self._break_off("abort")
        if self._thread.is_alive():
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join)

    def _leave(self, request: int) -> None:
        if request in self._answers:
            for index in self._answers[request].open:
                self.metrics.piece(request, Piece(text="", reason="abort", index=index))
            self._forget(request)
            self._inbox.put((request, None, None))

    def _forget(self, request: int) -> None:
        del self._answers[request]
        self._begun.discard(request)
        self.metrics.end(request)
        if not self._answers:
            self._idle.set()

    def _deliver(self, pieces: list[tuple[int, Piece]]) -> None:
        """In the event loop: hand pieces to who waits for them."""
        for request, piece in pieces:
            answers = self._answers.get(request)
            if answers is None:
                continue
            self._begun.add(request)
            self.metrics.piece(request, piece)
            answers.put(piece)
            if not answers.open:
                self._forget(request)

    def _break_off(self, reason: str) -> None:
        """In the event loop: end all answers."""
        for request, answers in list(self._answers.items()):
            self._deliver([(request, Piece(text="", reason=reason, index=index)) for index in sorted(answers.open)])

    def _run(self) -> None:
        """The engine's thread. What a step cannot cope with ends the service, not the process."""
        try:
            self._work()
        except Exception:
            LOG.exception("the engine has failed")
            self.ready = False
            self._loop.call_soon_threadsafe(self._break_off, "error")

    def _work(self) -> None:
        """What came in, then a step, and so on until told to stop."""
        while True:
            try:
                while True:
                    message = self._inbox.get(block=not self.engine.has_work)
                    if message is None:
                        return
                    self._take(*message)
            except queue.Empty:
                pass
            pieces = self.engine.step()
            if pieces:
                self._loop.call_soon_threadsafe(self._deliver, pieces)

    def _take(self, request: int, prompt: Prompt | None, params: SamplingParams | None) -> None:
        if prompt is None:
            self.engine.abort(request)
            return
        try:
            self.engine.submit(prompt, params, request=request)
        except Exception:
            LOG.exception("request %d could not be begun", request)
            failed = [(request, Piece(text="", reason="error", index=index)) for index in range(params.n)]
            self._loop.call_soon_threadsafe(self._deliver, failed)
