"""The chat page in a real browser, and what a person does there."""

import base64
import shutil
from contextlib import asynccontextmanager, contextmanager

from playwright.sync_api import expect, sync_playwright
from tests.serve.api.fakes import MODEL

from fulmen.serve.api.app import create_app
from fulmen.serve.api.images import ImageReader
from fulmen.serve.service import Service

CHROMIUM = shutil.which("chromium")
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


def app_of(engine, name=MODEL):
    """With the engine at work as long as the application runs."""
    service = Service(engine)
    images = ImageReader(engine.image_processor, engine.image_token)

    @asynccontextmanager
    async def lifespan(_):
        async with service:
            yield

    return create_app(service, model_name=name, tokenizer=engine.tokenizer, images=images, lifespan=lifespan)
