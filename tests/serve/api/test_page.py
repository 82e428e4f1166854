"""The chat page in a real browser, from a server that says what the test wants. No other host is asked for anything.

`python -m tests.serve.api.test_page FILE.png` writes the picture of the docs, with --image that of an answer about an
image: of the model at --server, which must see, or of a random one.
"""

import argparse
import base64
import io
import re
import shutil
import tempfile
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from tests.serve.api.fakes import MODEL, FakeService, failed, live
from tests.serve.api.pictures import png

from fulmen.config import UserError
from fulmen.data import ImageProcessor
from fulmen.serve import Engine, EngineSettings
from fulmen.serve.api.app import create_app
from fulmen.serve.api.images import ImageReader
from fulmen.serve.api.limits import MAX_BODY, MAX_IMAGE_BODY
from fulmen.serve.service import Service
from fulmen.serve.types import Piece, QueueFull

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Debian's chromium, which is not here")
WAIT = 15_000  # milliseconds until what a test waits for counts as missing
expect.set_options(timeout=WAIT)


@contextmanager
def browser(**options):
    """A page in a browser of its own, and the list of what it complained of and of the addresses that it asked."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_context(**options).new_page()
        page.set_default_timeout(WAIT)
        page.complaints, page.asked = [], []
        page.on("console", lambda message: page.complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        yield page
        chromium.close()


@pytest.fixture(scope="module")
def _page():
    with browser() as page:
        yield page


@pytest.fixture
def service(tokenizer):
    return FakeService(tokenizer)


@pytest.fixture
def key():
    return None


@pytest.fixture
def images():
    return None


@pytest.fixture
def app(service, tokenizer, key, images):
    return create_app(service, model_name=MODEL, tokenizer=tokenizer, api_key=key, images=images)


@pytest.fixture
def page(_page, app):
    """The page, loaded from its server and as new."""
    with live(app) as address:
        _page.unroute_all()
        _page.goto(address)
        _page.complaints.clear()
        _page.asked.clear()
        _page.address = address
        _page.reload()
        yield _page
        assert all(url.startswith((address, "data:")) for url in _page.asked)


def send(page, text):
    page.fill("#message", text)
    page.press("#message", "Enter")


def text_of(page, turn=-1):
    return page.locator(".turn .body").nth(turn).inner_text()


def wait_until_done(page):
    expect(page.locator("#regenerate")).to_be_visible()


def messages(service, tokenizer):
    """The roles and texts of the last prompt."""
    prompt = tokenizer.decode(service.asked[-1][0], skip_special=False)
    turns = prompt.split("<beginning_of_sentence>")[1:]
    return [turn.removesuffix("<end_of_sentence>\n").split("\n", 1) for turn in turns]


def test_a_message_and_its_answer(page, service, tokenizer):
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "100")
    page.fill("#seed", "7")
    page.locator("#temperature").fill("0.5")
    send(page, "What is kept?")
    wait_until_done(page)
    assert text_of(page, 0) == "What is kept?"
    assert text_of(page) == "Lightning keeps a state."
    assert messages(service, tokenizer) == [
        ["system ai_setting=assistant", "Be brief."],
        ["user name=user", "What is kept?"],
        ["ai name=assistant", ""],
    ]
    params = service.asked[-1][1]
    assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.5, 1.0, 100, 7)
    prompt, _ = service.asked[-1]
    assert page.inner_text("#used") == f"{len(prompt) + 10} / {service.max_context}"
    assert page.inner_text("#model") == MODEL
    assert "10 tokens" in page.inner_text(".turn.assistant .foot")
    assert page.complaints == []


def test_a_conversation_goes_on(page, service, tokenizer):
    send(page, "One")
    wait_until_done(page)
    send(page, "Two")
    expect(page.locator(".turn.assistant .foot")).to_have_count(2)
    assert [text for _, text in messages(service, tokenizer)] == ["One", "Lightning keeps a state.", "Two", ""]
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert page.is_visible("#empty")


def test_stop_ends_the_request(page, service):
    service.hold = 4
    send(page, "Go on")
    expect(page.locator(".turn.assistant .body")).to_contain_text("Lightning keeps")
    assert page.get_attribute("#log", "aria-busy") == "true"
    page.click("#stop")
    wait_until_done(page)
    assert service.left.wait(10)
    assert text_of(page) == "Lightning keeps"
    assert "stopped" in page.inner_text(".turn.assistant .foot")
    assert page.complaints == []


def test_escape_stops_too(page, service):
    service.hold = 2
    send(page, "Go on")
    expect(page.locator(".turn.assistant .body")).to_contain_text("Ligh")
    page.keyboard.press("Escape")
    assert service.left.wait(10)


def test_regenerate_asks_the_same_again(page, service):
    send(page, "Again?")
    wait_until_done(page)
    service.text = "Something else."
    page.click("#regenerate")
    expect(page.locator(".turn.assistant .body")).to_have_text("Something else.")
    assert page.locator(".turn").count() == 2
    (first, _), (second, _) = service.asked
    assert first == second


def test_code_is_shown_as_code_and_markup_as_text(page, service):
    service.text = "Use `f`:\n\n```python\nprint('<b>')\n```\n<img src=x onerror=alert(1)>"
    send(page, "Code, please")
    wait_until_done(page)
    assert page.inner_text(".turn.assistant pre code") == "print('<b>')"
    assert page.inner_text(".turn.assistant figcaption").startswith("python")
    assert page.inner_text(".turn.assistant .prose code") == "f"
    assert "<img src=x onerror=alert(1)>" in text_of(page)
    assert page.locator(".turn img, .turn b").count() == 0


def test_a_failure_is_told_and_can_be_repeated(page, service):
    service.pieces = failed("error", "logits are not finite")
    send(page, "Go")
    page.wait_for_selector(".error")
    assert page.inner_text(".error") == "logits are not finite"
    assert text_of(page) == "Light"
    assert page.input_value("#message") == ""
    service.pieces = service.say
    page.click("#regenerate")
    expect(page.locator(".turn.assistant .body")).to_have_text(service.text)
    assert page.locator(".error").count() == 0


def refuse(page, service):
    service.error = UserError("no such thing")


def refuse_for_now(page, service):
    service.error = QueueFull(3)


def break_off(page, service):
    service.pieces = lambda *_: [Piece(text="", reason="error", error="logits are not finite")]


def disconnect(page, service):
    page.route("**/completions", lambda route: route.abort())


FAILURES = [
    (refuse, "no such thing"),
    (refuse_for_now, "the queue is full; try again in 3 s"),
    (break_off, "logits are not finite"),
    (disconnect, "The server cannot be reached."),
]


def mend(page, service):
    """So that the server answers again."""
    service.error, service.pieces, service.hold = None, service.say, None
    page.unroute_all()


@contextmanager
def held(page):
    """Keeps a question from the server until the end of the block."""
    routes = []
    page.route("**/completions", lambda route: routes.append(route))
    yield
    while not routes:
        page.wait_for_timeout(10)
    routes[0].continue_()
    page.unroute_all()


@pytest.mark.parametrize(("fail", "error"), FAILURES)
def test_a_message_without_an_answer_goes_back(page, service, tokenizer, fail, error):
    send(page, "One")
    wait_until_done(page)
    fail(page, service)
    send(page, "Two")
    expect(page.locator(".error")).to_have_text(error)
    expect(page.locator("#message")).to_have_value("Two")
    assert page.locator(".turn.user .body").all_inner_texts() == ["One"]
    assert page.locator("#regenerate").count() == 1
    mend(page, service)
    send(page, "Three")
    expect(page.locator(".turn.assistant .foot")).to_have_count(2)
    wait_until_done(page)
    assert page.locator(".error").count() == 0
    assert page.input_value("#message") == ""
    assert [text for _, text in messages(service, tokenizer)] == ["One", "Lightning keeps a state.", "Three", ""]


def test_a_message_that_is_stopped_before_its_answer_goes_back(page, service, tokenizer):
    service.hold = 0
    send(page, "One")
    page.click("#stop")
    expect(page.locator("#message")).to_have_value("One")
    assert "stopped" in page.inner_text(".turn .foot")
    mend(page, service)
    send(page, "Two")
    wait_until_done(page)
    assert page.locator(".turn").count() == 2
    assert [text for _, text in messages(service, tokenizer)] == ["Two", ""]


def test_what_was_written_meanwhile_is_kept(page, service):
    service.error = UserError("no such thing")
    with held(page):
        send(page, "One\nmore")
        page.fill("#message", "Two ")
    page.wait_for_selector(".error")
    assert page.input_value("#message") == "One\nmore\n\nTwo "


def test_nothing_goes_back_into_a_new_chat(page, service):
    service.hold = 0
    send(page, "One")
    expect(page.locator("#stop")).to_be_visible()
    page.click("#new")
    expect(page.locator("#status")).to_have_text("Stopped.")
    assert page.input_value("#message") == ""
    assert page.locator(".turn").count() == 0
    assert page.is_visible("#empty")


@pytest.mark.parametrize(("fail", "error"), FAILURES)
def test_an_answer_stays_when_no_other_comes(page, service, fail, error):
    send(page, "Again?")
    wait_until_done(page)
    page.fill("#message", "A draft")
    fail(page, service)
    page.click("#regenerate")
    expect(page.locator(".error")).to_have_text(error)
    assert page.locator(".turn .body").all_inner_texts() == ["Again?", service.text, ""]
    assert page.input_value("#message") == "A draft"
    mend(page, service)
    service.text = "Something else."
    page.click("#regenerate")
    expect(page.locator(".turn.assistant .body")).to_have_text("Something else.")
    assert page.locator(".error").count() == 0
    assert service.asked[0] == service.asked[-1]


@pytest.mark.parametrize("key", ["secret"])
def test_a_key_is_asked_for_and_kept_for_the_tab(page, service):
    send(page, "Hello")
    page.wait_for_selector(".error")
    assert "API key" in page.inner_text(".error")
    assert page.evaluate("document.activeElement.id") in ("key", "message")
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    expect(page.locator("#model")).to_have_text(MODEL)
    page.press("#message", "Enter")
    expect(page.locator(".turn.assistant .body")).to_have_text(service.text)
    assert page.evaluate("[sessionStorage.getItem('fulmen-key'), localStorage.length]") == ["secret", 0]
    page.evaluate("sessionStorage.clear()")


def test_dark_and_narrow(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.evaluate(ground) != light
    page.evaluate("localStorage.clear()")
    page.set_viewport_size({"width": 380, "height": 700})
    page.reload()
    assert page.is_hidden("#settings")
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    page.set_viewport_size({"width": 1280, "height": 720})


def test_every_field_has_a_name(page):
    page.set_viewport_size({"width": 1280, "height": 720})
    page.reload()
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, textarea')]"
        ".filter((field) => !field.labels.length && !field.ariaLabel).map((field) => field.id)"
    )
    assert unnamed == []


# Images

SLOTS = "#previews .preview"


def choose(page, *contents):
    """Through the dialog for files."""
    files = [{"name": f"{n}.png", "mimeType": "image/png", "buffer": content} for n, content in enumerate(contents)]
    page.set_input_files("#files", files)


def hand_over(page, kind, content, mime="image/png", text=""):
    """As a paste or drop event that holds a file."""
    page.evaluate(
        """([kind, content, type, text]) => {
            const data = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            data.items.add(new File([bytes], "file", { type }));
            if (text) data.setData("text/plain", text);
            const rest = { bubbles: true, cancelable: true };
            const event = kind === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, ...rest })
                : new DragEvent(kind, { dataTransfer: data, ...rest });
            document.querySelector("#message").dispatchEvent(event);
        }""",
        [kind, base64.b64encode(content).decode(), mime, text],
    )


def sizes(service):
    """Of the images of each request so far."""
    return [[image.layout.size for image in images] for images in service.shown]


def test_a_model_without_eyes_is_shown_no_images(page, service):
    expect(page.locator("#model")).to_have_text(MODEL)
    assert page.is_hidden("#attach")
    assert page.is_hidden("#images-hint")
    for kind in ("paste", "drop"):
        hand_over(page, kind, png())
        expect(page.locator("#notice")).to_have_text("This model takes no images.")
        assert page.locator(SLOTS).count() == 0
    send(page, "Hello")
    wait_until_done(page)
    assert page.is_hidden("#notice")


class TestBeforeTheModelIsKnown:
    @pytest.fixture
    def key(self):
        return "secret"

    @pytest.fixture
    def images(self, tokenizer):
        return ImageReader(ImageProcessor(crop_size=56), tokenizer.image_id)

    def test_attaching_asks_for_it(self, page):
        expect(page.locator("#model")).to_contain_text("API key")
        hand_over(page, "drop", png())
        expect(page.locator("#notice")).to_contain_text("this server needs its API key")
        page.evaluate("document.querySelector('#key').value = 'secret'")  # no event says so
        hand_over(page, "drop", png())
        expect(page.locator(SLOTS)).to_have_count(1)
        assert page.is_hidden("#notice")


class TestImages:
    @pytest.fixture
    def images(self, tokenizer, service):
        service.max_context = 4000
        return ImageReader(ImageProcessor(crop_size=56), tokenizer.image_id, max_images=3)

    @pytest.fixture(autouse=True)
    def _is_loaded(self, page):
        expect(page.locator("#attach")).to_be_visible()

    def test_several_are_attached_shown_and_sent(self, page, service, tokenizer):
        assert page.is_disabled("#send")
        choose(page, png(40, 30), png(60, 50, "blue"))
        expect(page.locator(f"{SLOTS} img")).to_have_count(2)
        send(page, "Which colours?")
        wait_until_done(page)
        assert page.is_hidden("#previews")
        assert page.locator(".turn.user img").count() == 2
        assert page.locator(".turn.user .body").inner_text() == "Which colours?"
        assert sizes(service) == [[(40, 30), (60, 50)]]
        # First the images, then the text.
        assert service.asked[0][0].count(tokenizer.image_id) == sum(image.positions for image in service.shown[0])
        text = tokenizer.decode(service.asked[0][0])
        assert text.count("Which colours?") == 1
        assert page.complaints == []

    def test_one_can_be_removed(self, page, service):
        choose(page, png(40, 30), png(60, 50), png(70, 70))
        expect(page.locator(SLOTS)).to_have_count(3)
        page.get_by_role("button", name="Remove image 2").click()
        expect(page.locator(SLOTS)).to_have_count(2)
        send(page, "These?")
        wait_until_done(page)
        assert sizes(service) == [[(40, 30), (70, 70)]]

    @pytest.mark.parametrize("kind", ["paste", "drop"])
    def test_paste_and_drop(self, page, service, kind):
        hand_over(page, kind, png(50, 40))
        expect(page.locator(SLOTS)).to_have_count(1)
        page.click("#send")  # without a word
        wait_until_done(page)
        assert sizes(service) == [[(50, 40)]]
        assert page.locator(".turn.user .prose").count() == 0
        assert page.locator(".turn.user img").get_attribute("alt") == "Image 1"

    def test_text_that_comes_with_a_picture_is_pasted_as_text(self, page):
        hand_over(page, "paste", png(), text="A cell of a table")
        page.wait_for_timeout(100)
        assert page.locator(SLOTS).count() == 0

    def test_a_file_that_is_dragged_over_is_welcome(self, page):
        hand_over(page, "dragover", png())
        assert page.get_attribute("body", "class") == "dragging"
        hand_over(page, "dragleave", png())
        assert page.get_attribute("body", "class") == ""

    def test_they_stay_in_the_conversation(self, page, service):
        choose(page, png(40, 30))
        expect(page.locator(SLOTS)).to_have_count(1)
        send(page, "This?")
        wait_until_done(page)
        page.click("#regenerate")
        wait_until_done(page)
        expect(page.locator(".turn.assistant .foot")).to_have_count(1)
        choose(page, png(60, 50))
        expect(page.locator(SLOTS)).to_have_count(1)
        send(page, "And that?")
        expect(page.locator(".turn.assistant .foot")).to_have_count(2)
        assert sizes(service) == [[(40, 30)], [(40, 30)], [(40, 30), (60, 50)]]
        assert service.asked[0] == service.asked[1]
        page.click("#new")
        send(page, "Hello")
        wait_until_done(page)
        assert sizes(service)[3:] == [[]]

    def test_no_more_than_the_server_takes(self, page):
        choose(page, png(), png())
        expect(page.locator(SLOTS)).to_have_count(2)
        send(page, "These?")
        wait_until_done(page)
        choose(page, png(), png())
        expect(page.locator("#notice")).to_have_text("One chat holds at most 3 images here.")
        assert page.locator(SLOTS).count() == 1

    @pytest.mark.parametrize(("mime", "format"), [("image/png", "PNG"), ("image/jpeg", "JPEG")])
    def test_a_large_picture_is_made_smaller(self, page, service, mime, format):
        file = io.BytesIO()
        Image.linear_gradient("L").resize((3024, 1512)).convert("RGB").save(file, format)
        bodies = []
        page.on("request", lambda request: bodies.append(request.post_data))
        hand_over(page, "drop", file.getvalue(), mime)
        expect(page.locator(SLOTS)).to_have_count(1)
        send(page, "This?")
        wait_until_done(page)
        assert sizes(service) == [[(2016, 1008)]]
        assert f"data:{mime};base64," in next(body for body in bodies if body)
        assert page.complaints == []

    def test_what_is_many_bytes_becomes_jpeg(self, page, service):
        """A PNG of noise, as files of photographs are; all of a conversation's images go with each turn."""
        file = io.BytesIO()
        Image.effect_noise((1200, 1200), 100).convert("RGB").save(file, "PNG")
        assert len(file.getvalue()) > 1_200_000
        hand_over(page, "drop", file.getvalue())
        expect(page.locator(SLOTS)).to_have_count(1)
        url = page.locator(f"{SLOTS} img").get_attribute("src")
        assert url.startswith("data:image/jpeg;base64,")
        assert len(url) < 1_500_000
        send(page, "This?")
        wait_until_done(page)
        assert sizes(service) == [[(1200, 1200)]]

    def test_no_more_bytes_than_the_server_takes(self, page):
        source = page.content()
        most = float(re.search(r"LARGEST_IMAGES = (\S+);", source)[1])
        assert most < MAX_IMAGE_BODY - MAX_BODY - 1_000_000  # what is around them
        page.evaluate("turns.push({ role: 'user', text: '', images: ['a'.repeat(LARGEST_IMAGES - 1000)] })")
        choose(page, png(), bytes(png(400, 400)) + bytes(2000))
        expect(page.locator("#notice")).to_have_text(
            "One chat holds no more bytes of images here. A new chat has room again."
        )
        assert page.locator(SLOTS).count() == 1

    def test_a_new_chat_has_none(self, page, service):
        choose(page, png(), png())
        expect(page.locator(SLOTS)).to_have_count(2)
        page.click("#new")
        assert page.is_hidden("#previews")
        send(page, "Hello")
        wait_until_done(page)
        assert sizes(service) == [[]]

    def test_what_is_transparent_becomes_white(self, page, service):
        file = io.BytesIO()
        Image.new("RGBA", (2100, 2100), (0, 0, 0, 0)).save(file, "WEBP")
        hand_over(page, "drop", file.getvalue(), "image/webp")
        expect(page.locator(SLOTS)).to_have_count(1)
        send(page, "This?")
        wait_until_done(page)
        (image,) = service.shown[0]
        assert image.pixels[0].min() > 1.9  # normalised

    @pytest.mark.parametrize(("content", "mime"), [(b"%PDF-", "application/pdf"), (png()[:40], "image/png")])
    def test_what_is_no_picture_is_refused_at_once(self, page, content, mime):
        hand_over(page, "drop", content, mime)
        expect(page.locator("#notice")).to_have_text("file is no picture that this browser can read.")
        assert page.locator(SLOTS).count() == 0

    def test_what_the_server_refuses_is_told_and_goes_back(self, page, service):
        choose(page, png(40, 30), png(1, 2000))
        expect(page.locator(SLOTS)).to_have_count(2)
        send(page, "These?")
        page.wait_for_selector(".error")
        assert "too thin" in page.inner_text(".error")
        assert page.locator(SLOTS).count() == 2
        assert page.locator(".turn.user").count() == 0
        page.get_by_role("button", name="Remove image 2").click()
        page.press("#message", "Enter")
        wait_until_done(page)
        assert text_of(page, 0) == "These?"
        send(page, "And now?")
        expect(page.locator(".turn.assistant .foot")).to_have_count(2)
        wait_until_done(page)
        assert page.locator(".error").count() == 0
        assert sizes(service) == [[(40, 30)], [(40, 30)]]

    def test_pictures_that_were_added_meanwhile_come_last(self, page, service):
        choose(page, png(1, 2000), png(40, 30))
        expect(page.locator(SLOTS)).to_have_count(2)
        with held(page):
            page.click("#send")
            choose(page, png(60, 50), png(70, 70))
            expect(page.locator("#notice")).to_have_text("One chat holds at most 3 images here.")
        page.wait_for_selector(".error")
        assert page.locator(SLOTS).count() == 3
        assert page.input_value("#message") == ""
        page.get_by_role("button", name="Remove image 1").click()
        page.click("#send")
        wait_until_done(page)
        assert sizes(service) == [[(40, 30), (60, 50)]]

    def test_narrow(self, page):
        page.set_viewport_size({"width": 380, "height": 700})
        choose(page, *[png(900, 300)] * 3)
        expect(page.locator(SLOTS)).to_have_count(3)
        send(page, "These?")
        wait_until_done(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        page.set_viewport_size({"width": 1280, "height": 720})


def app_of(engine, name=MODEL):
    """With the engine at work as long as the application runs."""
    service = Service(engine)
    images = ImageReader(engine.image_processor, engine.image_token)

    @asynccontextmanager
    async def lifespan(_):
        async with service:
            yield

    return create_app(service, model_name=name, tokenizer=engine.tokenizer, images=images, lifespan=lifespan)


class TestModel:
    @pytest.fixture
    def app(self, seeing_engine):
        return app_of(seeing_engine)

    def test_a_model_answers(self, page, seeing_engine):
        expect(page.locator("#attach")).to_be_visible()
        page.fill("#max_tokens", "5")
        choose(page, png(200, 120))
        expect(page.locator(SLOTS)).to_have_count(1)
        send(page, "What is this?")
        wait_until_done(page)
        assert page.locator(".error").count() == 0
        used = int(page.inner_text("#used").split(" / ")[0].replace(",", ""))
        assert used > seeing_engine.image_processor.layout(200, 120).positions
        assert page.complaints == []


ANSWER = """A lightning layer keeps one matrix per head and sequence. Each token adds the outer product of its key and \
value to it, and what was there before fades by a fixed rate:

```python
def step(state, q, k, v, rate):
    state = torch.exp(-rate) * state + torch.outer(k, v)
    return q @ state, state
```

So its memory does not grow with the text. The `softmax` layers between keep keys and values of all tokens, in pages."""


def draw(path):
    """Write the picture of the docs."""
    from fulmen.data import Tokenizer

    tokenizer = Tokenizer.train([ANSWER], 330)
    service = FakeService(tokenizer, ANSWER)
    service.max_context, service.pause = 4096, 0.012
    sizes = {"viewport": {"width": 1180, "height": 760}, "device_scale_factor": 2}
    with (
        live(create_app(service, model_name="scripted-demo", tokenizer=tokenizer)) as address,
        browser(**sizes) as page,
    ):
        page.goto(address)
        page.fill("#system", "Answer briefly, with code where it helps.")
        page.fill("#seed", "1")
        send(page, "What does a lightning attention layer remember?")
        wait_until_done(page)
        page.screenshot(path=path)


def chart():
    """The PNG of a picture that one can ask about."""
    from matplotlib.figure import Figure

    figure, file = Figure((5, 3.2), dpi=120, layout="tight"), io.BytesIO()
    axes = figure.add_subplot()
    axes.bar(["apples", "pears", "plums", "cherries"], [3, 7, 2, 5], color=["#c33", "#8a3", "#75a", "#a24"])
    axes.set_title("Fruit sold")
    figure.savefig(file)
    return file.getvalue()


@contextmanager
def random_server():
    """The address of a model that sees and does not know what it says."""
    from fulmen.checkpoint import make_tiny

    with tempfile.TemporaryDirectory() as folder:
        make_tiny(folder, vision=True)
        engine = Engine.load(folder, EngineSettings(max_sequences=1, memory=10**9))
    with live(app_of(engine, "random")) as address:
        yield address


def draw_image(path, picture, question, server, temperature):
    """Write the picture of the docs that has one in it."""
    sizes = {"viewport": {"width": 1180, "height": 760}, "device_scale_factor": 2}
    with nullcontext(server) if server else random_server() as address, browser(**sizes) as page:
        page.set_default_timeout(120_000)
        page.goto(address)
        expect(page.locator("#attach")).to_be_visible()
        page.locator("#temperature").fill(temperature)
        page.fill("#max_tokens", "60")
        page.fill("#seed", "1")
        choose(page, picture)
        expect(page.locator(SLOTS)).to_have_count(1)
        send(page, question)
        expect(page.locator("#regenerate")).to_be_visible(timeout=120_000)
        choose(page, picture)  # shows how the next one waits
        expect(page.locator(SLOTS)).to_have_count(1)
        page.fill("#message", "And here?")
        page.screenshot(path=path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("path", help="the PNG to write")
    parser.add_argument("--image", nargs="?", const="", metavar="FILE", help="ask about this picture, or about a chart")
    parser.add_argument("--ask", default="Which bar is the largest?", metavar="TEXT")
    parser.add_argument("--server", metavar="URL", help="of a model that sees (default: a random one)")
    parser.add_argument("--temperature", default="0")
    arguments = parser.parse_args()
    if arguments.image is None:
        draw(arguments.path)
        return
    picture = Path(arguments.image).read_bytes() if arguments.image else chart()
    draw_image(arguments.path, picture, arguments.ask, arguments.server, arguments.temperature)


if __name__ == "__main__":
    main()
