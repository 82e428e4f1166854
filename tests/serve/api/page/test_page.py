"""Messages, answers, settings and errors on the chat page."""

import pytest
from playwright.sync_api import expect
from tests.serve.api.fakes import MODEL, failed
from tests.serve.api.page.browser import CHROMIUM, held, messages, send, text_of, wait_until_done

from fulmen.config import UserError
from fulmen.serve.types import Piece, QueueFull

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Debian's chromium, which is not here")


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
