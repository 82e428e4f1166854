"""Size, keys, origins."""

import json
import socket

import pytest
from fastapi.testclient import TestClient
from tests.serve.api.fakes import live
from tests.serve.api.requests import CHAT, HELLO, error_of


def test_bodies_that_are_too_large(new_app, service):
    client = TestClient(new_app(max_body=1000))
    status, message, _ = error_of(client.post(CHAT, json=HELLO | {"user": "x" * 1000}))
    assert (status, message) == (413, "the body has more than the 1000 bytes that this server takes")
    fits = json.dumps(HELLO).encode().ljust(1000)
    headers = {"content-type": "application/json"}
    assert client.post(CHAT, content=fits, headers=headers).status_code == 200
    read = []

    def pieces():
        for _ in range(100):
            read.append(1)
            yield b" " * 100

    assert client.post(CHAT, content=pieces(), headers=headers).status_code == 413
    assert client.post(CHAT, content=b"{}", headers=headers | {"content-length": "9" * 5000}).status_code == 413


@pytest.mark.parametrize("chunked", [False, True])
def test_the_rest_of_a_large_body_is_not_read(new_app, chunked):
    """100 MB are announced, or come without end; the answer is there before they are."""
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 100000000"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()
    with live(new_app(max_body=1000)) as address, socket.create_connection(address.split("/")[2].split(":")) as peer:
        peer.settimeout(20)
        peer.sendall(head + (b"400\r\n" + b" " * 1024 + b"\r\n" if chunked else b" "))
        answer = b""
        while part := peer.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"that this server takes" in answer


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "secret", "Basic secret", "Bearer secret\xe9"])
def test_a_key_is_needed(new_app, header):
    client = TestClient(new_app(api_key="secret"))
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for method, path in (
        ("POST", CHAT),
        ("POST", "/tokenize"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/x"),
    ):
        response = client.request(method, path, headers=headers)
        assert error_of(response)[0] == 401
        assert response.headers["www-authenticate"] == "Bearer"
    assert client.get("/openapi.json", headers=headers).status_code == 401
    assert client.get("/health", headers=headers).status_code == 200
    assert client.get("/", headers=headers).status_code == 200


def test_the_right_key(new_app):
    client = TestClient(new_app(api_key="sécret"), headers={"authorization": "bearer sécret".encode()})
    assert client.post(CHAT, json=HELLO).status_code == 200
    twice = [("authorization", b"Bearer a"), ("authorization", "Bearer sécret".encode())]
    assert TestClient(client.app).get("/v1/models", headers=twice).status_code == 401


def test_other_origins(new_app):
    preflight = {"origin": "http://a.example", "access-control-request-method": "POST"}
    closed, opened = TestClient(new_app()), TestClient(new_app(cors_origins=["http://a.example"], api_key="k"))
    assert closed.options(CHAT, headers=preflight).status_code == 405
    assert "access-control-allow-origin" not in closed.post(CHAT, json=HELLO, headers=preflight).headers
    allowed = opened.options(CHAT, headers=preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "http://a.example")
    assert opened.options(CHAT, headers=preflight | {"origin": "http://b.example"}).status_code == 400
    # Without it a page could not read why it was refused.
    assert opened.post(CHAT, json=HELLO, headers=preflight).headers["access-control-allow-origin"] == "http://a.example"
