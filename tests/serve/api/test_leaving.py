"""Clients that leave, and servers that stop."""

import asyncio
import json

import httpx
import pytest
from fastapi.testclient import TestClient
from tests.serve.api.fakes import live
from tests.serve.api.requests import CHAT, GO_ON, HELLO, TEXT, call, error_of, events_of


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (TEXT, GO_ON), (TEXT, GO_ON | {"prompt": ["a", "b"]})])
@pytest.mark.parametrize("leave_after", [0, 1, 2, 4])
def test_who_leaves_a_stream_ends_its_request(app, service, path, body, leave_after):
    service.hold = 5
    asyncio.run(call(app, body | {"stream": True}, path, leave_after))
    assert service.left.is_set()
    assert service.open == 0


@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (TEXT, GO_ON), (TEXT, GO_ON | {"prompt": ["a", "b"]})])
def test_who_leaves_before_a_whole_answer_ends_its_request(app, service, path, body):
    service.hold = 2
    (start, _) = asyncio.run(call(app, body, path, leave_after=0))
    assert start["status"] == 499
    assert service.left.is_set()
    assert service.open == 0


def test_a_stream_whose_sending_fails_ends_its_request(app, service):
    service.hold = 5

    async def go():
        with pytest.raises(OSError, match="gone"):
            await call_failing(app)

    async def call_failing(app):
        async def send(message):
            if message["type"] == "http.response.body":
                raise OSError("gone")

        incoming = [{"type": "http.request", "body": json.dumps(HELLO | {"stream": True}).encode()}]

        async def receive():
            return incoming.pop() if incoming else await asyncio.Event().wait()

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "http_version": "1.1"}
        await app(scope | {"headers": [(b"content-type", b"application/json")]}, receive, send)

    asyncio.run(go())
    assert service.open == 0


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_a_live_server(app, service, stream):
    service.hold = 3
    with live(app) as address, httpx.Client(base_url=address) as http:
        with http.stream("POST", CHAT, json=HELLO | {"stream": True}) as response:
            lines = response.iter_lines()  # kept: the connection would be closed with it
            assert next(lines).startswith("data: ")
            if not stream:
                service.left.clear()
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(address + CHAT, json=HELLO, timeout=0.5)
                assert service.left.wait(10)
                service.left.clear()
        assert service.left.wait(10)


def test_time_runs_out(new_app, service):
    service.hold = 3
    client = TestClient(new_app(request_timeout=0.05))
    for path, body in ((CHAT, HELLO), (TEXT, GO_ON | {"prompt": ["a", "b"]})):
        assert error_of(client.post(path, json=body))[0] == 504
        *_, last = events_of(client.post(path, json=body | {"stream": True}))
        assert last["error"]["code"] == "timeout"
    assert service.open == 0


@pytest.mark.parametrize("why", ["stopping", "not ready"])
def test_not_ready(app, client, service, why):
    assert client.get("/health").json() == {"status": "ok"}
    if why == "stopping":
        app.state.stopping = True
    else:
        service.ready = False
    for response in (
        client.get("/health"),
        client.post(CHAT, json=HELLO),
        client.post(TEXT, json=GO_ON),
        client.post("/tokenize", json={"prompt": "a"}),
    ):
        assert error_of(response)[0] == 503
        assert response.headers["retry-after"] == "5"
    assert client.get("/metrics").status_code == 200
    assert not service.asked


@pytest.mark.parametrize(
    ("path", "body", "encode"), [(CHAT, HELLO, "chat.encode_chat"), (TEXT, GO_ON, "completions._encode")]
)
def test_a_stop_while_a_prompt_is_encoded(client, service, monkeypatch, path, body, encode):
    def stopping(*_, **__):
        service.ready = False
        return [5] if path == CHAT else [[5]]

    monkeypatch.setattr(f"fulmen.serve.api.{encode}", stopping)
    response = client.post(path, json=body)
    assert error_of(response)[0] == 503
    assert response.headers["retry-after"] == "5"
    assert not service.asked
