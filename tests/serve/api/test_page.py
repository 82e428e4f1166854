"""The chat page in a real browser, from a server that says what the test wants. No other host is asked for anything.

`python -m tests.serve.test_page FILE.png` writes the picture of the docs.
"""

import shutil
import sys
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect, sync_playwright
from tests.serve.api.fakes import MODEL, FakeService, failed, live

from fulmen.serve.api.app import create_app

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
def page(_page, service, tokenizer, key):
    """The page, loaded from its server and as new."""
    with live(create_app(service, model_name=MODEL, tokenizer=tokenizer, api_key=key)) as address:
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
    service.pieces = service.say
    page.click("#regenerate")
    expect(page.locator(".turn.assistant .body")).to_have_text(service.text)
    assert page.locator(".error").count() == 0


@pytest.mark.parametrize("key", ["secret"])
def test_a_key_is_asked_for_and_kept_for_the_tab(page, service):
    send(page, "Hello")
    page.wait_for_selector(".error")
    assert "API key" in page.inner_text(".error")
    assert page.evaluate("document.activeElement.id") in ("key", "message")
    page.fill("#key", "secret")
    page.press("#key", "Tab")
    expect(page.locator("#model")).to_have_text(MODEL)
    page.click("#regenerate")
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


if __name__ == "__main__":
    draw(sys.argv[1])
