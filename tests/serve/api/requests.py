"""Requests that are asked again and again, and what their answers hold."""

import asyncio
import json

from tests.serve.api.fakes import MODEL

HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
GO_ON = {"model": MODEL, "prompt": "Lightning", "max_tokens": 100}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}
NEEDED, USER = ("model", "messages", "prompt", "tokens"), HELLO["messages"]


def error_of(response):
    """(status, message, param), of an answer in the shape of OpenAI's errors."""
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["message"], error["param"]


def events_of(response):
    """The chunks of a stream."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end = response.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def call(app, body, path=CHAT, leave_after=None):
    """The messages of an answer over plain ASGI. The client leaves after so many of them; None: it stays."""
    sent, left = [], asyncio.Event()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    incoming = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive():
        if incoming:
            return incoming.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if len(sent) == leave_after:
            left.set()

    if leave_after == 0:
        left.set()
    await asyncio.wait_for(app(scope, receive, send), 10)
    return sent
