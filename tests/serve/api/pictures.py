"""Small pictures, harmless and hostile, as the files that clients send."""

import base64
import io
import struct
import zlib

from PIL import Image


def picture(width=40, height=40, colour="red"):
    return Image.new("RGB", (width, height), colour)


def png(width=40, height=40, colour="red"):
    file = io.BytesIO()
    picture(width, height, colour).save(file, "PNG")
    return file.getvalue()


def bomb(width=30_000, height=30_000):
    """A PNG whose few bytes are 900 million pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def part(url, **others):
    return {"type": "image_url", "image_url": {"url": url, **others}}


def asking(*parts):
    """Messages of one user, of texts and of images' bytes or parts."""
    kinds = {str: lambda text: {"type": "text", "text": text}, bytes: lambda content: part(data_url(content))}
    return [{"role": "user", "content": [kinds.get(type(item), lambda same: same)(item) for item in parts]}]
