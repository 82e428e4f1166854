"""`python -m tests.serve.api.page.draw FILE.png` writes the picture of the docs.

With --image that of an answer about an image: of the model at --server, which must see, or of a random one.
"""

import argparse
import io
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

from playwright.sync_api import expect
from tests.serve.api.fakes import FakeService, live
from tests.serve.api.page.browser import SLOTS, app_of, browser, choose, send, wait_until_done

from fulmen.serve import Engine, EngineSettings
from fulmen.serve.api.app import create_app

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
