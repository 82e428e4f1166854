"""Clients of `fulmen serve` for bench/load.py: HTTP over asyncio's own streams, cheap enough for hundreds at once."""

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator

MODEL, COMPLETIONS, CHAT = "load", "/v1/completions", "/v1/chat/completions"
OUTCOMES = ("finished", "left", "refused", "broken off", "incomplete", "failed", "hung")
PATIENCE = 120.0
"""Seconds after which a request counts as hung."""
WORDS = ("state", "decay", "key", "value", "token", "query", "head", "layer", "page", "slot", "answer", "prompt")


class Load:
    """What clients do, and what became of their requests."""

    def __init__(self, port: int):
        self.port, self.counts, self.events = port, Counter(), 0

    async def client(self, number: int, end: float, leaving: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            path, body = request(rng)
            limit = rng.randrange(body["max_tokens"]) if rng.random() < leaving else None
            try:
                async with asyncio.timeout(PATIENCE):
                    outcome, wait = await self.stream(path, body, limit)
            except TimeoutError:
                outcome, wait = "hung", 0
            except (OSError, EOFError):
                outcome, wait = "failed", 0
            self.counts[outcome] += 1
            await asyncio.sleep(wait)

    async def stream(self, path: str, body: dict, limit: int | None = None, at=lambda: None) -> tuple[str, int]:
        """(what became of a request, seconds to wait before the next one).

        The client leaves after `limit` events, if there are so many. at: called at every event.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(http("POST", path, json.dumps(body | {"model": MODEL, "stream": True}).encode()))
            if limit == 0:
                return "left", 0
            status, headers = await response(reader)
            if status != 200:
                wait = headers.get("retry-after", "")
                return ("refused", int(wait)) if status == 429 and wait.isdecimal() else ("failed", 0)
            return await self._read(reader, body.get("n", 1), limit, at), 0
        finally:
            writer.transport.abort() if limit is not None and limit % 2 else writer.close()

    async def _read(self, reader: asyncio.StreamReader, answers: int, limit: int | None, at) -> str:
        seen, reasons, has_failed = 0, 0, False
        try:
            async for event in events(reader):
                seen, self.events = seen + 1, self.events + 1
                at()
                if event == "[DONE]":
                    return "broken off" if has_failed else "finished" if reasons == answers else "incomplete"
                chunk = json.loads(event)
                has_failed |= "error" in chunk
                reasons += sum(choice["finish_reason"] is not None for choice in chunk.get("choices", ()))
                if seen == limit:
                    return "left"
        except (asyncio.IncompleteReadError, OSError):
            pass
        return "incomplete"


def request(rng: random.Random) -> tuple[str, dict]:
    """A path and a body: prompts and answers of mixed lengths; one in ten wants two answers."""
    words = " ".join(rng.choices(WORDS, k=int(2 ** rng.uniform(0, 6))))
    body = {"max_tokens": int(2 ** rng.uniform(0, 7.5)), "temperature": 1.0, "n": 1 + (rng.random() < 0.1)}
    if rng.random() < 0.5:
        return COMPLETIONS, body | {"prompt": words}
    return CHAT, body | {"messages": [{"role": "user", "content": words}]}


def http(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + body


async def response(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, whose names are in small letters."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = (line.split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value for name, value in headers}


async def events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The data of server-sent events; the server sends each as one chunk of HTTP."""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunk = await reader.readexactly(size + 2)
        yield chunk.decode().strip().removeprefix("data: ")


async def gauges(port: int) -> dict[str, float]:
    """The metrics without labels, but for the request that asks for them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(http("GET", "/metrics"))
    await response(reader)
    found = dict(re.findall(r"^fulmen_(\w+) (\S+)$", (await reader.read()).decode(), re.MULTILINE))
    writer.close()
    numbers = {name: float(value) for name, value in found.items()}
    return numbers | {"http_requests_in_flight": numbers["http_requests_in_flight"] - 1}
