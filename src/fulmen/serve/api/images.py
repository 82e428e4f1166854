"""Images of requests: from the URLs in messages to what the model takes, and no more of them than memory can bear."""

import asyncio
import base64
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from fulmen.config import UserError
from fulmen.data import ImageProcessor, ProcessedImage
from fulmen.run.threads import release_openmp_threads
from fulmen.serve.api.errors import ApiError, blaming
from fulmen.serve.api.fetch import fetch
from fulmen.serve.api.protocol import ImagePart

MAX_IMAGES = 16
"""Images of a request, unless the server is told otherwise."""
WORKERS = 2
"""Images that are decoded at once: the largest ones take 750 MB each meanwhile."""
FETCHES = 8
"""Images that are fetched at once, and held until they are decoded."""
DATA_URL = re.compile(r"data:image/[\w.+-]{1,64};base64,", re.ASCII | re.IGNORECASE)
WEB_URL = re.compile(r"https?:", re.IGNORECASE)


@dataclass(frozen=True)
class AskedImage:
    """param: the field that it comes from. detail: low gives the thumbnail alone."""

    param: str
    url: str
    detail: str | None


def asked_images(messages: Sequence[Any]) -> list[AskedImage]:
    """The images of a request's messages in order."""
    return [
        AskedImage(f"messages[{number}].content[{place}].image_url.url", part.image_url.url, part.image_url.detail)
        for number, message in enumerate(messages)
        if isinstance(message.content, list)
        for place, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]


class ImageReader:
    """For one model. max_images: of a request. allow_urls: whether images may be fetched from public addresses."""

    def __init__(
        self,
        processor: ImageProcessor,
        image_token: int,
        *,
        max_images: int = MAX_IMAGES,
        allow_urls: bool = False,
    ):
        self.image_token, self.max_images = image_token, max_images
        self._allow_urls = allow_urls
        self._by_detail = {"low": replace(processor, dynamic=False)}
        self._processor = processor
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="images")
        self._fetching = asyncio.Semaphore(FETCHES)

    async def read(self, asked: Sequence[AskedImage]) -> list[ProcessedImage]:
        """One after the other. Raises ApiError (400) with the field of the first that cannot be had.

        If there are too many, none of them is read.
        """
        if len(asked) > self.max_images:
            message = f"messages: they hold {len(asked)} images; {self.max_images} is the most here"
            raise ApiError(400, message, param="messages", code="too_many_images")
        images = []
        for image in asked:
            with blaming(image.param):
                images.append(await self._read(image))
        return images

    async def _read(self, asked: AskedImage) -> ProcessedImage:
        processor = self._by_detail.get(asked.detail, self._processor)
        if not WEB_URL.match(asked.url):
            return await self._in_pool(_read_data, processor, asked.url)
        if not self._allow_urls:
            raise UserError("this server fetches no images from addresses: send the image itself as a data: URL")
        async with self._fetching:
            content = await fetch(asked.url, processor.limits.max_bytes)
            return await self._in_pool(_process, processor, content)

    async def _in_pool(self, *call: Any) -> ProcessedImage:
        return await asyncio.get_running_loop().run_in_executor(self._pool, *call)


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of an image in a data: URL. Raises UserError for what is none, and for too many before it decodes."""
    head = DATA_URL.match(url)
    if head is None:
        raise UserError("an image is given as data:image/TYPE;base64,DATA")
    # Padding may stand for two of them.
    if (len(url) - head.end()) // 4 * 3 - 2 > max_bytes:
        raise UserError(f"the image has more than {max_bytes} bytes: make it smaller or compress it")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except ValueError as error:
        raise UserError(f"the image's data are not base64: {error}") from None


def _read_data(processor: ImageProcessor, url: str) -> ProcessedImage:
    return _process(processor, decode_data_url(url, processor.limits.max_bytes))


def _process(processor: ImageProcessor, content: bytes) -> ProcessedImage:
    try:
        return processor.read(content)
    finally:
        release_openmp_threads()  # the engine's are the ones that shall spin
