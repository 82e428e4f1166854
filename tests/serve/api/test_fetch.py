"""Fetching what a client names: public addresses alone, the one that was checked, and not for long."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time

import pytest

from fulmen.config import UserError
from fulmen.serve.api import fetch as module
from fulmen.serve.api.fetch import fetch, is_public

PUBLIC = "93.184.216.34"


def get(url, max_bytes=1000):
    return asyncio.run(fetch(url, max_bytes))


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "2606:4700:4700::1111"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1"),
        *("169.254.169.254", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::", "::1", "fe80::1", "fe80::1%1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1"),
        # IPv4 within IPv6: mapped, compatible, 6to4, Teredo, NAT64.
        *("::ffff:127.0.0.1", "::127.0.0.1", "2002:7f00:1::", "2001:0:4136:e378::", "64:ff9b::a9fe:a9fe"),
    ],
)
def test_other_addresses(address):
    assert not is_public(address)


@pytest.fixture
def names(monkeypatch):
    """names(a, b, ...) lets any host have these addresses, and gives the list of the look-ups."""

    def make(*addresses):
        asked = []

        def look_up(host, port, *_, **__):
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr("socket.getaddrinfo", look_up)
        return asked

    return make


@pytest.fixture
def connected(monkeypatch):
    """The arguments of each connection, none of which comes about."""
    made = []

    async def connect(*arguments, **options):
        made.append((arguments, options))
        raise ConnectionRefusedError

    monkeypatch.setattr("asyncio.open_connection", connect)
    return made


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/", "http://localhost/", "http://[::1]/", "https://[::ffff:10.0.0.1]/"),
        *("http://169.254.169.254/latest/meta-data", "http://2130706433/", "http://0x7f.1/", "http://0/"),
    ],
)
def test_addresses_of_this_network_are_not_connected_to(connected, url):
    with pytest.raises(UserError, match="not one of the public internet"):
        get(url)
    assert not connected


def test_one_private_address_among_public_ones_is_enough(connected, names):
    names(PUBLIC, "10.0.0.1")
    with pytest.raises(UserError, match="not one of the public internet"):
        get("http://example.com/a.png")
    assert not connected


def test_look_ups_have_threads_of_their_own(names, connected, monkeypatch):
    names(PUBLIC)
    look_up, threads = socket.getaddrinfo, []

    def watched(*arguments, **options):
        threads.append(threading.current_thread().name)
        return look_up(*arguments, **options)

    monkeypatch.setattr("socket.getaddrinfo", watched)
    with pytest.raises(UserError, match="cannot be reached"):
        get("http://example.com/a.png")
    assert [name.startswith("look-ups") for name in threads] == [True]


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_the_address_that_was_checked_is_connected_to(connected, names, scheme, port):
    """A name that means another address the next time it is asked for (DNS rebinding) is not asked for again."""
    asked = names(PUBLIC)
    with pytest.raises(UserError, match="cannot be reached"):
        get(f"{scheme}://example.com/a.png")
    assert asked == ["example.com"]
    ((arguments, options),) = connected
    assert arguments == (PUBLIC, port)
    if scheme == "https":
        # The certificate must be the name's all the same.
        assert options["server_hostname"] == "example.com"
        assert options["ssl"].verify_mode == ssl.CERT_REQUIRED
        assert options["ssl"].check_hostname


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@example.com/", "without a user's name, at port 80 for http"),
        ("http://me@example.com/", "without a user's name"),
        ("http://example.com:8080/", "at port 80 for http"),
        ("https://example.com:80/", "at port 443 for https"),
        ("http://example.com:99999/", "is not a URL"),
        ("http://[::1/", "is not a URL"),
        ("http://", "must be a URL"),
        ("http:///a.png", "must be a URL"),
        ("http:a.png", "must be a URL"),
        ("http://exämple.com/", "ASCII"),
        ("http://example.com/a b", "without blanks"),
        ("http://example.com/a\r\nHost: b", "without blanks"),
        ("http://example.com/a\tb", "without blanks"),
        ("http://a_%2f/", "must be a URL"),
        ("http://example.com/" + "a" * 2048, "at most 2048 ASCII characters"),
        (f"http://{'a' * 64}.com/", "cannot be reached|names no host"),
    ],
)
def test_what_is_no_address(connected, url, message):
    with pytest.raises(UserError, match=message):
        get(url)
    assert not connected


@contextlib.contextmanager
def served(monkeypatch, *answers, keeps=False):
    """A server in this network, for once taken for a public one, that gives each connection the next answer.

    Yields the list of what was asked. keeps: it does not close connections.
    """
    heads, opened = [], []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)

        def serve():
            for answer in answers:
                with contextlib.suppress(OSError):
                    connection, _ = listening.accept()
                    opened.append(connection)
                    heads.append(connection.recv(65536))
                    connection.sendall(answer)
                    if not keeps:
                        connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        monkeypatch.setattr(module, "is_public", lambda address: address == "127.0.0.1")
        monkeypatch.setitem(module.PORTS, "http", listening.getsockname()[1])
        yield heads
    thread.join(20)
    for connection in opened:
        connection.close()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 5\r\n\r\nimage",
        OK + b"\r\nimage",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nim\r\n3\r\nage\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nimage",
    ],
)
def test_what_is_there(monkeypatch, answer):
    with served(monkeypatch, answer) as asked:
        assert get("http://localhost/a.png?b=c#d") == b"image"
    head, *lines = asked[0].decode().split("\r\n")
    assert head == "GET /a.png?b=c HTTP/1.1"
    assert {"Host: localhost", "Connection: close", "Accept-Encoding: identity"} <= set(lines)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://localhost/b\r\n\r\n", "answered 302: redirects are not followed"),
        (b"HTTP/1.1 404 Not Found\r\n\r\nno", "answered 404$"),
        (OK + b"Content-Length: 50\r\n\r\nimage", "half an answer"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nimage", "half an answer"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nimage", "half an answer"),
        (b"SSH-2.0-OpenSSH\r\n", "none of HTTP"),
        (b"", "none of HTTP"),
        (OK + b"A: b\r\n" * 200 + b"\r\n", "none of HTTP"),
    ],
)
def test_answers_that_hold_no_image(monkeypatch, answer, message):
    with served(monkeypatch, answer) as asked, pytest.raises(UserError, match=message):
        get("http://localhost/a.png")
    assert len(asked) == 1


@pytest.mark.parametrize("size", [1001, 10_000_000])
def test_no_more_is_read_than_allowed(monkeypatch, size):
    answer = OK + f"Content-Length: {size}\r\n\r\n".encode() + bytes(size)
    # Of many bytes the end is not waited for.
    with served(monkeypatch, answer, keeps=size > 100_000), pytest.raises(UserError, match="more than 1000 bytes"):
        get("http://localhost/a.png")
    with served(monkeypatch, OK + b"\r\n" + bytes(1000)):
        assert len(get("http://localhost/a.png")) == 1000


@pytest.mark.parametrize("answer", [b"", OK + b"Content-Length: 50\r\n\r\nimage"])
def test_who_takes_too_long_is_left(monkeypatch, answer):
    monkeypatch.setattr(module, "SECONDS", 0.2)
    begun = time.monotonic()
    with served(monkeypatch, answer, keeps=True), pytest.raises(UserError, match=r"did not come within 0\.2 s"):
        get("http://localhost/a.png")
    assert time.monotonic() - begun < 3
