"""Images on the chat page."""

import io
import re

import pytest
from PIL import Image
from playwright.sync_api import expect
from tests.serve.api.fakes import MODEL
from tests.serve.api.page.browser import (
    CHROMIUM,
    SLOTS,
    app_of,
    choose,
    hand_over,
    held,
    send,
    sizes,
    text_of,
    wait_until_done,
)
from tests.serve.api.pictures import png

from fulmen.data import ImageProcessor
from fulmen.serve.api.images import ImageReader
from fulmen.serve.api.limits import MAX_BODY, MAX_IMAGE_BODY

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Debian's chromium, which is not here")


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
