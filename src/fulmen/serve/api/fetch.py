"""What lies at an address that a client names: only a public one, lest the server be its eye in a private network."""

import asyncio
import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from urllib.parse import urlsplit

from fulmen.config import UserError

SECONDS = 10.0
"""From the look-up of the name to the last byte."""
MAX_URL = 2048
"""Characters of an address."""
MAX_HEAD = 64 * 1024
"""Bytes of an answer beside its content: headers, and lengths of chunks."""
LOOK_UPS = 4
"""Names that are looked up at once; one that nobody answers for keeps its thread longer than `SECONDS`."""
PORTS = {"http": 80, "https": 443}
UNICAST = ipaddress.ip_network("2000::/3")
"""Of IPv6 addresses those that are routed; none of the forms that wrap an address of IPv4 is among them, but 6to4."""


class _Target(NamedTuple):
    scheme: str
    host: str
    path: str  # with the query


async def fetch(url: str, max_bytes: int) -> bytes:
    """The content at an http(s) address. The status must be 200: redirects are not followed.

    The name is looked up once, every address that it has must be public, and the connection goes to one of these, so
    that a name which means another address a moment later gains nothing.
    Raises UserError for another address, what cannot be had within `SECONDS`, and more bytes than allowed.
    """
    target = _parse(url)
    try:
        async with asyncio.timeout(SECONDS):
            received = await _exchange(target, await _look_up(target), max_bytes + MAX_HEAD)
            # Of very many chunks it takes long.
            content = await asyncio.to_thread(_content, received)
    except TimeoutError:
        raise UserError(f"the image did not come within {SECONDS:g} s") from None
    except OSError:
        raise UserError("the image's address cannot be reached") from None
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    return content


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet's hosts."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6 and (ip not in UNICAST or ip.sixtofour is not None):
        return False
    return ip.is_global and not ip.is_multicast


def _parse(url: str) -> _Target:
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        raise UserError("the image's address is not a URL") from None
    if len(url) > MAX_URL or not re.fullmatch(r"[!-~]+", url) or not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host):
        raise UserError(f"the image's address must be a URL of at most {MAX_URL} ASCII characters, without blanks")
    if parts.username is not None or port not in (None, PORTS[scheme]):
        raise UserError(f"the image's address must be without a user's name, at port {PORTS[scheme]} for {scheme}")
    return _Target(scheme, host, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


async def _look_up(target: _Target) -> str:
    """One of the host's addresses."""
    look_up = functools.partial(socket.getaddrinfo, target.host, PORTS[target.scheme], type=socket.SOCK_STREAM)
    try:
        found = await asyncio.get_running_loop().run_in_executor(_threads(), look_up)
    except UnicodeError:  # a label that is too long
        raise UserError("the image's address names no host") from None
    addresses = [address for *_, (address, *_) in found]
    if not all(map(is_public, addresses)):
        raise UserError("the image's address is not one of the public internet, and this server fetches no others")
    return addresses[0]


async def _exchange(target: _Target, address: str, max_bytes: int) -> bytes:
    """All that the server sends, headers too, until it closes the connection."""
    secure = {"ssl": _tls(), "server_hostname": target.host} if target.scheme == "https" else {}
    reader, writer = await asyncio.open_connection(address, PORTS[target.scheme], **secure)
    try:
        host = f"[{target.host}]" if ":" in target.host else target.host
        head = f"GET {target.path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: fulmen\r\nAccept: image/*\r\n"
        writer.write(f"{head}Accept-Encoding: identity\r\nConnection: close\r\n\r\n".encode())
        received = bytearray()
        while part := await reader.read(64 * 1024):
            received += part
            if len(received) > max_bytes:
                raise _too_large(max_bytes - MAX_HEAD)
        return bytes(received)
    finally:
        writer.transport.abort()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """For look-ups alone, which would keep the event loop's own threads from all else."""
    return ThreadPoolExecutor(LOOK_UPS, thread_name_prefix="look-ups")


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class _Received:
    """What `HTTPResponse` takes for a socket."""

    def __init__(self, content: bytes):
        self._content = content

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._content)


def _content(received: bytes) -> bytes:
    response = http.client.HTTPResponse(_Received(received))
    try:
        response.begin()
        content = response.read()
    except (http.client.HTTPException, ValueError):
        raise UserError("the image's server gave half an answer, or none of HTTP") from None
    if response.status != 200:
        hint = ": redirects are not followed" if 300 <= response.status < 400 else ""
        raise UserError(f"the image's server answered {response.status}{hint}")
    return content


def _too_large(max_bytes: int) -> UserError:
    return UserError(f"the image has more than {max_bytes} bytes: make it smaller or compress it")
