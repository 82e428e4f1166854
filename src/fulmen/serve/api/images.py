"""Images of requests: from the URLs in messages to what the model takes, and no more of them than memory can bear."""

import asyncio
import base64
import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, TypeVar

from fulmen.config import UserError
from fulmen.data import ImageProcessor, ProcessedImage
from fulmen.data.image_files import picture_size
from fulmen.run.threads import release_openmp_threads
from fulmen.serve.api.errors import ApiError, blaming
from fulmen.serve.api.fetch import fetch
from fulmen.serve.api.protocol import ImagePart

T = TypeVar("T")

MAX_IMAGES = 16
"""Images of a request, unless the server is told otherwise."""
MAX_PIXELS = 2 * 1024**3
"""Bytes of pixels that all requests may hold together, from before they are decoded until the engine is done."""
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


@dataclass(eq=False)
class PixelCount:
    """Bytes of the pixels that one request holds, or will once its images are processed."""

    held: int = 0


@dataclass(frozen=True)
class _Need:
    """What an image will take, as far as its header tells: positions at least, bytes of pixels at most."""

    positions: int
    pixels: int


class ImageReader:
    """For one model. max_images: of a request. allow_urls: whether images may be fetched from public addresses.

    Use it as a context manager, or `close` it.
    """

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
        self._counts: set[PixelCount] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """End its threads as soon as they are done with what they do."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def counting(self) -> Iterator[PixelCount]:
        """The count of one request, which is among all requests' until the block ends."""
        count = PixelCount()
        self._counts.add(count)
        try:
            yield count
        finally:
            self._counts.remove(count)

    async def read(
        self,
        asked: Sequence[AskedImage],
        count: PixelCount,
        *,
        check_positions: Callable[[int], None] = lambda positions: None,
        elsewhere: Callable[[], int] = lambda: 0,
    ) -> list[ProcessedImage]:
        """One after the other. Raises ApiError (400) with the field of the first that cannot be had.

        Those in the request itself are measured first, and nothing is decoded if there are too many, too many pixels
        (429), or `check_positions` raises for the least number of positions that they take. count: of this request,
        one of `counting`. elsewhere: gives the bytes of pixels that requests hold which are counted no more.
        """
        if len(asked) > self.max_images:
            message = f"messages: they hold {len(asked)} images; {self.max_images} is the most here"
            raise ApiError(400, message, param="messages", code="too_many_images")
        needs = []
        for image in asked:
            with blaming(image.param):
                needs.append(await self._need(image))
        check_positions(sum(need.positions for need in needs))
        reserve = partial(self._reserve, count, elsewhere)
        reserve(sum(need.pixels for need in needs))
        images = []
        for image in asked:
            with blaming(image.param):
                images.append(await self._read(image, reserve))
        return images

    def _reserve(self, count: PixelCount, elsewhere: Callable[[], int], pixels: int) -> None:
        """Count so many bytes more, unless they are too many beside the others'. Alone, a request may have any."""
        others = elsewhere() + sum(other.held for other in self._counts if other is not count)
        if others and others + count.held + pixels > MAX_PIXELS:
            message = "the images of other requests fill the memory for them; try again"
            raise ApiError(429, message, code="images_full", headers={"Retry-After": "1"})
        count.held += pixels

    async def _need(self, asked: AskedImage) -> _Need:
        """Nothing yet for one that must be fetched."""
        if not WEB_URL.match(asked.url):
            return await self._in_pool(_measure_data, self._processor_of(asked), asked.url)
        if not self._allow_urls:
            raise UserError("this server fetches no images from addresses: send the image itself as a data: URL")
        return _Need(0, 0)

    async def _read(self, asked: AskedImage, reserve: Callable[[int], None]) -> ProcessedImage:
        processor = self._processor_of(asked)
        if not WEB_URL.match(asked.url):
            return await self._in_pool(_read_data, processor, asked.url)
        async with self._fetching:
            content = await fetch(asked.url, processor.limits.max_bytes)
            reserve((await self._in_pool(_measure, processor, content)).pixels)
            return await self._in_pool(_process, processor, content)

    def _processor_of(self, asked: AskedImage) -> ImageProcessor:
        return self._by_detail.get(asked.detail, self._processor)

    async def _in_pool(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)


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


def _measure_data(processor: ImageProcessor, url: str) -> _Need:
    return _measure(processor, decode_data_url(url, processor.limits.max_bytes))


def _measure(processor: ImageProcessor, content: bytes) -> _Need:
    """Of the picture as it is stored and as it may have to be turned, the best and the worst."""
    width, height = picture_size(content, processor.limits)
    layouts = [processor.layout(width, height), processor.layout(height, width)]
    crops = max(1 + rows * columns for rows, columns in (layout.grid for layout in layouts))
    return _Need(min(layout.positions for layout in layouts), crops * 3 * processor.crop_size**2)


def _read_data(processor: ImageProcessor, url: str) -> ProcessedImage:
    return _process(processor, decode_data_url(url, processor.limits.max_bytes))


def _process(processor: ImageProcessor, content: bytes) -> ProcessedImage:
    try:
        return processor.read(content)
    finally:
        release_openmp_threads()  # the engine's are the ones that shall spin
