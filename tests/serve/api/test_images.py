"""Images in requests: what the model is shown, what is refused and by which name, and how much is taken at a time."""

import asyncio
import gc
import io
import json
import threading
import time
import weakref

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import ExifTags, Image
from tests.serve.api.fakes import MODEL, FakeService
from tests.serve.api.pictures import asking, bomb, data_url, part, picture, png
from tests.serve.api.requests import CHAT, HELLO, TEXT, call, error_of, events_of

from fulmen.data import ImageLimits, ImageProcessor
from fulmen.serve.api import images, limits
from fulmen.serve.api.app import create_app
from fulmen.serve.api.images import ImageReader, decode_data_url
from fulmen.serve.api.limits import BodyLimit

PROCESSOR = ImageProcessor(crop_size=56)
SMALL = png()
URL = "messages[0].content[1].image_url.url"


def ask(*parts, **others):
    return {"model": MODEL, "messages": asking(*parts), **others}


@pytest.fixture
def service(tokenizer):
    return FakeService(tokenizer)


@pytest.fixture
def new_app(service, tokenizer):
    def make(processor=PROCESSOR, reading=(), **settings):
        reader = ImageReader(processor, tokenizer.image_id, **dict(reading))
        return create_app(service, model_name=MODEL, tokenizer=tokenizer, images=reader, **settings)

    return make


@pytest.fixture
def client(new_app):
    return TestClient(new_app())


@pytest.fixture
def blind(service, tokenizer):
    """Of a model of text alone."""
    return TestClient(create_app(service, model_name=MODEL, tokenizer=tokenizer))


def test_what_the_model_is_shown(client, service, tokenizer):
    reply = client.post(CHAT, json=ask("Which ", SMALL, " is it? <image>", png(30, 90, "blue"))).json()
    (prompt, _), (first, second) = service.asked[0], service.shown[0]
    expected = [PROCESSOR.process(picture()), PROCESSOR.process(picture(30, 90, "blue"))]
    assert [first.digest, second.digest] == [image.digest for image in expected]
    assert prompt.count(tokenizer.image_id) == sum(image.positions for image in expected)
    text = tokenizer.decode([token for token in prompt if token != tokenizer.image_id], skip_special=False)
    assert "user name=user\nWhich  is it? <image><end_of_sentence>" in text
    assert reply["usage"]["prompt_tokens"] == len(prompt)
    assert reply["choices"][0]["message"]["content"] == service.text


def test_images_of_earlier_messages_and_streams(client, service):
    answer = {"role": "assistant", "content": "Red."}
    body = {"model": MODEL, "messages": [*asking(SMALL, "This?"), answer, *asking("That?", png(50, 40, "green"))]}
    chunks = events_of(client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert [image.layout.size for image in service.shown[0]] == [(40, 40), (50, 40)]
    assert chunks[-1]["usage"]["prompt_tokens"] == len(service.asked[0][0])


@pytest.mark.parametrize(("detail", "is_small"), [("low", True), ("high", False), ("auto", False), (None, False)])
def test_detail(client, service, detail, is_small):
    assert client.post(CHAT, json=ask(part(data_url(SMALL), detail=detail))).status_code == 200
    (image,) = service.shown[0]
    assert (image.positions == PROCESSOR.layout(40, 40).thumbnail) == is_small


def test_types_that_are_declared(client):
    """The content says what it is; what is declared must be an image of some kind."""
    for kind in ("image/png", "IMAGE/JPEG", "image/x-icon"):
        assert client.post(CHAT, json=ask(part(data_url(SMALL, kind)))).status_code == 200


def test_tokens_count_images(client, service):
    body = ask("Which?", SMALL)
    reply = client.post("/tokenize", json=body).json()
    client.post(CHAT, json=body)
    assert reply["tokens"] == service.asked[0][0]
    assert reply["count"] == len(reply["tokens"])


def test_the_card_says_how_many(new_app, blind):
    client = TestClient(new_app(reading={"max_images": 3}))
    assert client.get("/v1/models").json()["data"][0]["max_images"] == 3
    assert blind.get("/v1/models").json()["data"][0]["max_images"] == 0


# What is refused


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_a_model_that_takes_no_images(blind, service, path):
    status, message, param = error_of(blind.post(path, json=ask("Which?", SMALL)))
    assert (status, param) == (400, "messages[0].content[1]")
    assert message == "messages[0].content[1]: this model takes no images"
    assert blind.post(CHAT, json=HELLO).status_code == 200


HOSTILE = {
    "truncated": (data_url(png(300, 300)[:-40]), "damaged"),
    "header alone": (data_url(SMALL[:20]), "damaged header"),
    "no bytes": ("data:image/png;base64,", "is empty"),
    "svg": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>"), "not a picture"),
    "bomb": (data_url(bomb()), "more than 50000000 pixels"),
    "thin": (data_url(png(1, 10_000)), "too thin"),
    "not base64": ("data:image/png;base64,iVBOR%0A", "not base64"),
    "blanks": (data_url(SMALL)[:60] + " " + data_url(SMALL)[60:], "not base64"),
    "padding": ("data:image/png;base64,iVBORw0", "not base64"),
    "letters": ("data:image/png;base64,ä", "not base64"),
    "text": (data_url(b"hello", "text/plain"), "given as data:image/TYPE;base64,DATA"),
    "percent": ("data:image/png,%89PNG", "given as data:image/TYPE;base64,DATA"),
    "path": ("/etc/hostname", "given as data:image/TYPE;base64,DATA"),
    "nothing": ("", "given as data:image/TYPE;base64,DATA"),
    "file": ("file:///etc/hostname", "given as data:image/TYPE;base64,DATA"),
    "ftp": ("ftp://example.com/a.png", "given as data:image/TYPE;base64,DATA"),
    "javascript": ("javascript:alert(1)", "given as data:image/TYPE;base64,DATA"),
    "link-local": ("http://169.254.169.254/latest/meta-data", "fetches no images from addresses"),
    "public": ("HTTPS://example.com/a.png", "fetches no images from addresses"),
}


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images(client, service, monkeypatch, name, path):
    url, part_of_message = HOSTILE[name]

    def touched(*_, **__):
        raise AssertionError("something was read")

    for place in ("fulmen.data.image_files._read_file", "socket.getaddrinfo", "fulmen.serve.api.fetch._exchange"):
        monkeypatch.setattr(place, touched)
    status, message, param = error_of(client.post(path, json=ask("Which?", part(url))))
    assert (status, param) == (400, URL)
    assert message.startswith(f"{URL}: ")
    assert part_of_message in message
    assert not service.asked
    assert client.post(path, json=ask("Which?", SMALL)).status_code == 200


def test_schemes_where_addresses_are_allowed(new_app):
    client = TestClient(new_app(reading={"allow_urls": True}))
    for url in ("file:///etc/hostname", "ftp://example.com/a.png", "gopher://example.com/"):
        assert error_of(client.post(CHAT, json=ask("a", part(url))))[::2] == (400, URL)
    for url in ("http://169.254.169.254/", "http://localhost/a.png", "http://[::1]/", "https://127.1/"):
        status, message, param = error_of(client.post(CHAT, json=ask("a", part(url))))
        assert (status, param) == (400, URL)
        assert "not one of the public internet" in message


def test_an_image_that_is_fetched(new_app, service, monkeypatch):
    async def fetch(url, max_bytes):
        assert (url, max_bytes) == ("https://example.com/a.png", 20_000_000)
        return SMALL

    monkeypatch.setattr(images, "fetch", fetch)
    client = TestClient(new_app(reading={"allow_urls": True}))
    assert client.post(CHAT, json=ask("a", part("https://example.com/a.png"))).status_code == 200
    assert service.shown[0][0].digest == PROCESSOR.process(picture()).digest


def test_too_many_images(client, service, monkeypatch):
    monkeypatch.setattr(images, "_process", None)  # none of them is decoded
    for count in (200, 17):
        response = client.post(CHAT, json=ask(*[SMALL] * count))
        message = f"messages: they hold {count} images; 16 is the most here"
        assert error_of(response) == (400, message, "messages")
        assert response.json()["error"]["code"] == "too_many_images"
    assert not service.asked


def test_as_many_images_as_allowed(new_app, service):
    service.max_context = 10_000
    assert TestClient(new_app()).post(CHAT, json=ask(*[SMALL] * 16)).status_code == 200
    assert len(service.shown[0]) == 16
    assert error_of(TestClient(new_app(reading={"max_images": 1})).post(CHAT, json=ask(SMALL, SMALL)))[0] == 400


def test_an_image_of_too_many_bytes_is_not_decoded(new_app, monkeypatch):
    limit = ImageLimits(max_bytes=len(SMALL))
    processor = ImageProcessor(crop_size=56, limits=limit)
    client = TestClient(new_app(processor))
    assert client.post(CHAT, json=ask("a", SMALL)).status_code == 200
    monkeypatch.setattr("base64.b64decode", None)
    status, message, param = error_of(client.post(CHAT, json=ask("a", bytes(len(SMALL) + 9))))
    assert (status, param) == (400, URL)
    assert f"more than {len(SMALL)} bytes" in message


@pytest.mark.parametrize("size", range(1, 8))
def test_the_bytes_of_an_image_are_counted_from_its_letters(size):
    url = data_url(bytes(size))
    assert decode_data_url(url, size) == bytes(size)


def test_images_that_do_not_fit_the_context(client, service):
    response = client.post(CHAT, json=ask("a", *[png(336, 336)] * 2))
    assert error_of(response)[::2] == (400, "messages")
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert not service.asked


def test_what_does_not_fit_the_context_is_not_decoded(client, monkeypatch):
    monkeypatch.setattr(images, "_process", None)
    response = client.post(CHAT, json=ask("a", *[png(336, 336)] * 2))
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_tokens_are_counted_beyond_the_context(client, service):
    reply = client.post("/tokenize", json=ask("a", *[png(336, 336)] * 2)).json()
    assert reply["count"] > reply["max_model_len"] == service.max_context


def test_images_are_the_users(client):
    for role in ("system", "assistant"):
        body = HELLO | {"messages": [{"role": role, "content": [part(data_url(SMALL))]}]}
        assert error_of(client.post(CHAT, json=body))[::2] == (400, "messages[0].content[0].type")


# How much at a time


def test_few_are_decoded_at_once(new_app, monkeypatch):
    """However many requests come, and nobody waits for them in the event loop."""
    lock, most, now = threading.Lock(), [0], [0]
    process = images._process

    def slowly(*arguments):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return process(*arguments)

    monkeypatch.setattr(images, "_process", slowly)

    async def go():
        transport = httpx.ASGITransport(new_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as http:
            asked = [http.post(CHAT, json=ask(SMALL, SMALL), timeout=60) for _ in range(8)]
            return [response.status_code for response in await asyncio.gather(*asked)]

    assert asyncio.run(go()) == [200] * 8
    assert most[0] == images.WORKERS


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_pixels_are_counted_before_they_are_decoded(client, service, monkeypatch, path):
    """With those that the engine has; alone, a request may have any number."""
    need = PROCESSOR.process(picture()).crops.nbytes
    monkeypatch.setattr(images, "MAX_PIXELS", 3 * need)
    service.pixels = need
    assert client.post(path, json=ask(SMALL, SMALL)).status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(images, "_process", None)
        response = client.post(path, json=ask(SMALL, SMALL, SMALL))
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["code"] == "images_full"
    assert client.post(path, json=HELLO).status_code == 200
    service.pixels = 0
    assert client.post(path, json=ask(*[SMALL] * 4)).status_code == 200


def test_pixels_count_until_the_request_is_handed_over(new_app, monkeypatch):
    """Those that are fetched count as soon as their size is known."""
    need = PROCESSOR.process(picture()).crops.nbytes
    monkeypatch.setattr(images, "MAX_PIXELS", 2 * need)
    gate, begun = threading.Event(), threading.Event()
    process = images._process

    def slowly(*arguments):
        begun.set()
        assert gate.wait(20)
        return process(*arguments)

    async def fetch(*_):
        return SMALL

    monkeypatch.setattr(images, "_process", slowly)
    monkeypatch.setattr(images, "fetch", fetch)
    fetched = part("https://example.com/a.png")

    async def go():
        transport = httpx.ASGITransport(new_app(reading={"allow_urls": True}))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as http:

            async def post(*parts):
                return (await http.post(CHAT, json=ask(*parts), timeout=60)).status_code

            first = asyncio.create_task(post(SMALL, SMALL))
            await asyncio.to_thread(begun.wait, 20)
            others = [await post(item) for item in (SMALL, fetched)]
            gate.set()
            return [*others, await first, await post(SMALL, SMALL), await post(fetched, fetched, fetched)]

    assert asyncio.run(go()) == [429, 429, 200, 200, 200]


@pytest.mark.parametrize("size", [(40, 40), (300, 40), (40, 300), (120, 90), (57, 113), (200, 199)])
@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("dynamic", [True, False])
def test_what_an_image_needs_is_told_by_its_header(size, turn, dynamic):
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = turn
    picture(*size).save(file, "JPEG", exif=exif)
    processor = ImageProcessor(crop_size=56, dynamic=dynamic)
    need, image = images._measure(processor, file.getvalue()), processor.read(file.getvalue())
    assert image.layout.size == (size if turn == 1 else size[::-1])
    assert need.pixels >= image.crops.nbytes
    assert need.positions <= image.positions
    if size == (40, 40):
        assert (need.pixels, need.positions) == (image.crops.nbytes, image.positions)


def test_a_stream_holds_no_pixels(new_app, service, monkeypatch):
    """However long its client takes to read it: the service counts them only until the engine is done."""
    shown, stream = [], service.stream

    def watched(prompt, params):
        shown.extend(weakref.ref(placed.image) for placed in prompt.images)
        answers = stream(prompt, params)
        service.shown.clear()
        return answers

    monkeypatch.setattr(service, "stream", watched)
    service.hold = 2
    app = new_app()

    async def go():
        task = asyncio.create_task(call(app, ask(SMALL, stream=True)))
        while service.open == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        gc.collect()
        held = [image() for image in shown]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return held

    assert asyncio.run(go()) == [None]


def test_its_threads_end_with_it(tokenizer):
    with ImageReader(PROCESSOR, tokenizer.image_id) as reader:
        pass
    with pytest.raises(RuntimeError, match="after shutdown"):
        reader._pool.submit(print)


def test_who_leaves_is_not_read_for(new_app, service, monkeypatch):
    async def read(*_, **__):
        await asyncio.Event().wait()

    monkeypatch.setattr(ImageReader, "read", read)
    start, _ = asyncio.run(call(new_app(), ask(SMALL), leave_after=0))
    assert start["status"] == 499
    assert not service.asked


def test_bodies_have_room_for_images_alone(new_app, blind, service, monkeypatch):
    monkeypatch.setattr(limits, "MAX_BODY", 2000)
    client = TestClient(new_app(max_body=50_000))
    noise = bytes(range(256)) * 40
    large = part(data_url(SMALL + noise))
    assert client.post(CHAT, json=ask("Which?", large)).status_code == 200
    assert client.post(CHAT, json=ask("Which?", *[large] * 4)).status_code == 413
    looks_like_one = data_url(noise)
    for body in (
        ask("a" * 2000, large),
        ask(looks_like_one),
        ask("a", large, user=looks_like_one),
        HELLO | {"tools": [{"type": "function", "function": {"name": "go", "parameters": {"url": looks_like_one}}}]},
        {"model": MODEL, "messages": [[large]], "user": looks_like_one},
        {"model": MODEL, "messages": {"content": looks_like_one}},
    ):
        status, message, _ = error_of(client.post(CHAT, json=body))
        assert (status, message) == (
            413,
            "without images, the body has more than the 2000 bytes that this server takes",
        )
    assert error_of(client.post(TEXT, json={"model": MODEL, "prompt": looks_like_one}))[0] == 413
    many = b'{"a": "data:image/png;base64,", "b": ' + b"[]," * 1000
    response = client.post(CHAT, content=many, headers={"content-type": "application/json"})
    assert error_of(response)[0] == 413  # before it is read as JSON, which it is not


def test_short_strings_are_no_images(new_app, monkeypatch):
    """Millions of them would take seconds to find."""
    monkeypatch.setattr(limits, "MAX_BODY", 2000)
    client = TestClient(new_app())
    headers = {"content-type": "application/json"}
    for content in (b'"data:image/",' * 1000, b'"data:image/' + b"a" * 999 + b'",' + b" " * 1200):
        assert error_of(client.post(CHAT, content=content, headers=headers))[0] == 413


def test_large_bodies_are_read_in_a_thread(client, monkeypatch):
    threads, read = [], limits.read_json
    monkeypatch.setattr(limits, "read_json", lambda body: threads.append(threading.current_thread().name) or read(body))
    noise = bytes(range(256)) * 4000
    assert client.post(CHAT, json=ask(SMALL + noise)).status_code == 200
    assert client.post(CHAT, json=ask(SMALL)).status_code == 200
    assert ["worker" in name for name in threads] == [True, False]


def test_a_body_that_comes_too_slowly():
    """It is refused, and what it held is free again; who has sent all may wait for the answer as long as it takes."""

    async def go():
        async def app(scope, receive, send):
            while (await receive()).get("more_body"):
                pass
            await receive()

        limited = BodyLimit(app, limit=10**7, seconds=0.05)

        async def post(*messages):
            incoming = [{"type": "http.request", "body": bytes(2 * 10**6), "more_body": more} for more in messages]

            async def receive():
                if incoming:
                    return incoming.pop(0)
                await asyncio.sleep(0.2)
                return {"type": "http.disconnect"}

            await limited({"type": "http", "headers": []}, receive, None)

        with pytest.raises(limits.ApiError) as refused:
            await post(True, True)
        assert (refused.value.status_code, refused.value.headers["Connection"]) == (408, "close")
        assert limited._held == 0
        await post(True, False)

    asyncio.run(go())


def test_a_body_counts_until_its_answer_begins():
    async def go():
        held = []

        async def app(scope, receive, send):
            await receive()
            held.append(limited._held)
            await send({"type": "http.response.start"})
            held.append(limited._held)

        async def receive():
            return {"type": "http.request", "body": bytes(2 * 10**6)}

        async def send(_):
            pass

        limited = BodyLimit(app, limit=10**7)
        await limited({"type": "http", "headers": []}, receive, send)
        assert held == [2 * 10**6, 0]
        assert limited._held == 0

    asyncio.run(go())


def test_the_limits_of_bodies(new_app, blind, service, monkeypatch):
    monkeypatch.setattr("fulmen.serve.api.app.MAX_BODY", 3000)
    monkeypatch.setattr("fulmen.serve.api.app.MAX_IMAGE_BODY", 9000)
    of_text = TestClient(create_app(service, model_name=MODEL, tokenizer=service.tokenizer))
    body = json.dumps(HELLO).encode()
    headers = {"content-type": "application/json"}
    for client, most in ((of_text, 3000), (TestClient(new_app()), 9000)):
        assert client.post(CHAT, content=body.ljust(most), headers=headers).status_code == 200
        assert client.post(CHAT, content=body.ljust(most + 1), headers=headers).status_code == 413


def test_large_bodies_together_are_bounded(monkeypatch):
    """Those that are here count until they are answered; small ones are taken in any case."""
    monkeypatch.setattr(limits, "SMALL_BODY", 100)

    async def go():
        answer, arrived = asyncio.Event(), []

        async def app(scope, receive, send):
            arrived.append(len((await receive())["body"]))
            await answer.wait()

        limited = BodyLimit(app, limit=1000, together=1500)

        async def post(size):
            async def receive():
                return {"type": "http.request", "body": bytes(size)}

            await limited({"type": "http", "headers": []}, receive, None)

        first = asyncio.create_task(post(900))
        await asyncio.sleep(0)
        with pytest.raises(limits.ApiError) as refused:
            await post(700)
        assert (refused.value.status_code, refused.value.headers["Retry-After"]) == (429, "1")
        others = [asyncio.create_task(post(size)) for size in (100, 600)]
        await asyncio.sleep(0)
        assert arrived == [900, 100, 600]
        answer.set()
        await asyncio.gather(first, *others)
        await post(1000)
        assert limited._held == 0

    asyncio.run(go())
