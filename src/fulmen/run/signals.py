"""Stopping a run between two steps when it is asked to, rather than in the midst of one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """Turns SIGINT (Ctrl-C) and SIGTERM into a flag that a loop checks between its steps.

        with StopRequest() as stop:
            while not stop.requested: ...

    `requested` is the number of the signal that came, None until then. A Ctrl-C after that does not wait: it raises
    `KeyboardInterrupt` at once. The former handlers come back at the end. Python delivers signals to the main thread
    only, so in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._former:
            number, handler = self._former.popitem()
            # None stands for a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
