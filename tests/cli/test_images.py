"""`fulmen generate`, `chat` and `serve` with images."""

import argparse
import io
import re

import pytest
from PIL import Image

from fulmen.checkpoint import make_tiny
from fulmen.cli import serving
from fulmen.data import Tokenizer
from fulmen.serve import Engine, SamplingParams
from fulmen.serve.conversation import user_turn

GREEDY = ("--temperature", 0, "--max-tokens", 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that sees, one that does not, and pictures; tests only read them."""
    folder = tmp_path_factory.mktemp("images")
    make_tiny(folder / "sees", vision=True)
    make_tiny(folder / "blind")
    for name, colour in (("red.png", "red"), ("blue.jpg", "blue"), ("green.tiff", "green")):
        Image.new("RGB", (120, 90), colour).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:60])
    return folder


@pytest.fixture
def shown(monkeypatch):
    """The prompts that engines were given."""
    prompts, stream = [], Engine.stream

    def watched(self, prompt, params):
        prompts.append(prompt)
        return stream(self, prompt, params)

    monkeypatch.setattr(Engine, "stream", watched)
    return prompts


@pytest.fixture
def stdin(monkeypatch):
    """stdin("...") is what the command then reads."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


def assert_refused(result, *parts):
    code, out, err = result
    assert (code, out) == (2, "")
    assert re.fullmatch(r"fulmen: error: [^\n]+\n", err), err
    assert all(part in err for part in parts)


class TestGenerate:
    def test_the_answer_to_a_question(self, fulmen, folder):
        arguments = ("generate", folder / "sees", *GREEDY, "--prompt", "Which?")
        code, out, err = fulmen(*arguments, "--image", folder / "red.png", "--image", folder / "blue.jpg")
        assert (code, err) == (0, "")
        engine = Engine.load(folder / "sees")
        images = [folder / "red.png", folder / "blue.jpg"]
        prompt = engine.encode_chat([user_turn("Which?", images)])
        assert len(prompt.images) == 2
        (completion,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=8))
        assert out == completion.text + "\n"

    def test_standard_input(self, fulmen, folder, stdin, shown):
        stdin("Which?\n")
        assert fulmen("generate", folder / "sees", *GREEDY, "--image", folder / "green.tiff")[0] == 0
        (prompt,) = shown
        tokenizer = Tokenizer.load(folder / "sees")
        words = [token for token in prompt.tokens if token != tokenizer.image_id]
        assert "user name=user\nWhich?<end_of_sentence>" in tokenizer.decode(words, skip_special=False)

    def test_without_images_a_text_goes_on(self, fulmen, folder):
        for model in ("sees", "blind"):
            code, out, _ = fulmen("generate", folder / model, *GREEDY, "--prompt", "Attention lets")
            assert code == 0
            assert out.startswith("Attention lets")

    def test_what_is_no_image_is_refused_before_the_model_is_loaded(self, fulmen, folder):
        for name, part in (
            ("broken.png", "broken.png is damaged"),
            ("missing.png", "cannot read the image"),
            ("sees", "is not a file"),
            ("sees/config.json", "config.json is not a picture"),
        ):
            assert_refused(fulmen("generate", folder / "nothing", "-p", "a", "--image", folder / name), part)

    def test_what_is_too_thin_is_refused_before_the_model_is_loaded(self, fulmen, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(Engine, "load", None)
        Image.new("RGB", (1, 2000)).save(tmp_path / "thin.png")
        result = fulmen("generate", folder / "sees", "-p", "a", "--image", tmp_path / "thin.png")
        assert_refused(result, "an image of 1 x 2000 pixels is too thin")

    def test_a_model_that_takes_none(self, fulmen, folder):
        result = fulmen("generate", folder / "blind", "-p", "a", "--image", folder / "red.png")
        assert_refused(result, "this model takes no images")


class TestChat:
    def chat(self, fulmen, stdin, model, typed):
        stdin(typed)
        code, out, err = fulmen("chat", model, *GREEDY)
        assert (code, err) == (0, "")
        return out

    def test_an_image_goes_with_the_next_line(self, fulmen, folder, stdin, shown, monkeypatch):
        monkeypatch.chdir(folder)
        out = self.chat(fulmen, stdin, "sees", "/image red.png\n/image  blue.jpg \nWhich?\nAnd now?\n")
        assert out.count("ai: ") == 2
        assert "[red.png is shown with your next line]" in out
        first, second = shown
        assert [len(prompt.images) for prompt in shown] == [2, 2]
        assert second.keys()[: len(first)] == first.keys()

    def test_reset_forgets_them(self, fulmen, folder, stdin, shown):
        red = folder / "red.png"
        self.chat(fulmen, stdin, folder / "sees", f"/image {red}\n/reset\nHello\n/image {red}\nThis?\n/reset\nHello\n")
        assert [len(prompt.images) for prompt in shown] == [0, 1, 0]

    def test_what_cannot_be_shown_is_said_and_the_chat_goes_on(self, fulmen, folder, stdin, shown):
        typed = f"/image\n/image {folder}/broken.png\n/image {folder}/missing.png\nHello\n"
        out = self.chat(fulmen, stdin, folder / "sees", typed)
        assert "[name a file: /image FILE]" in out
        assert re.search(r"\[\S+broken\.png is damaged or of a rare kind: [^\n]+\]\n", out)
        assert re.search(r"\[cannot read the image \S+missing\.png: [^\n]+\]\n", out)
        assert out.count("ai: ") == 1
        assert not shown[0].images

    def test_a_home_that_nobody_has(self, fulmen, folder, stdin, shown):
        """Images that were attached before stay."""
        typed = f"/image {folder}/red.png\n/image ~nosuchuser/a.png\nThis?\n"
        out = self.chat(fulmen, stdin, folder / "sees", typed)
        assert re.search(r"\[cannot read the image ~nosuchuser/a\.png: [^\n]+\]\n", out)
        assert len(shown[0].images) == 1
        out = self.chat(fulmen, stdin, folder / "blind", f"/image {folder}/red.png\nHello\n")
        assert "[this model takes no images]" in out
        assert out.count("ai: ") == 1


class TestServe:
    @pytest.mark.parametrize("model", ["sees", "blind"])
    def test_what_the_server_is_told(self, fulmen, folder, monkeypatch, model):
        told = {}

        async def serve(engine, listening, **settings):
            told.update(settings)

        monkeypatch.setattr("fulmen.serve.server.serve", serve)
        assert fulmen("serve", folder / model, "--port", 0)[0] == 0
        assert (told["max_images"], told["allow_image_urls"]) == (16, False)
        arguments = ("--max-images", 3, "--allow-image-urls")
        assert fulmen("serve", folder / model, "--port", 0, *arguments)[0] == 0
        assert (told["max_images"], told["allow_image_urls"]) == (3, True)

    def test_the_default_is_the_rooms_own(self):
        from fulmen.serve.api.images import MAX_IMAGES

        verbs = argparse.ArgumentParser().add_subparsers()
        serving.add(verbs)
        assert verbs.choices["serve"].get_default("max_images") == MAX_IMAGES

    def test_a_wrong_number(self, fulmen, folder):
        code, _, err = fulmen("serve", folder / "sees", "--port", 0, "--max-images", 0)
        assert (code, "argument --max-images: must be an integer of at least 1, got '0'" in err) == (2, True)
