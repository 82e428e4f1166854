"""The built-in pictures: the same each time, questions that have one right answer, examples held out by name."""

import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFont

from fulmen.config import UserError
from fulmen.data.documents import Document
from fulmen.data.pictures import UNSEEN_VARIANT, open_pictures, split_pictures
from fulmen.data.pictures.charts import ChartPictures
from fulmen.data.pictures.drawing import INKS, PAPERS, place, write
from fulmen.data.pictures.emoji import EmojiPictures
from fulmen.data.pictures.words import FONTS, WORDS
from fulmen.data.sources import split

STAND_IN = f"emoji:{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
KINDS = {"digits": 1797, "words": len(WORDS) * len(FONTS), "charts": 4096, STAND_IN: None}


@pytest.fixture(params=KINDS, ids=lambda name: name.partition(":")[0])
def source(request):
    if request.param == "digits":
        pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    return open_pictures(request.param)


def test_examples_are_the_same_each_time_and_variants_differ(source):
    for number in (0, len(source) // 2, len(source) - 1):
        one, again, variant = (source.example(number, each) for each in (3, 3, UNSEEN_VARIANT))
        assert one.name == again.name == variant.name == source.name_of(number)
        assert (one.caption, one.refined, one.questions) == (again.caption, again.refined, again.questions)
        assert one.caption == variant.caption
        assert one.image.mode == "RGB"
        assert one.image.tobytes() == again.draw().tobytes()
        assert one.image.tobytes() != variant.image.tobytes()


def test_names_are_unique_and_pictures_not_blank(source):
    if isinstance(source, EmojiPictures):  # where skin tones share one
        assert len({source.name_of(number) for number in range(len(source))}) > len(source) / 3
    else:
        assert len({source.name_of(number) for number in range(len(source))}) == len(source)
    for number in range(0, len(source), len(source) // 9):
        picture = source.example(number, 0)
        assert np.asarray(picture.image).std() > 5
        assert picture.caption
        assert picture.refined[0].isupper()
        assert picture.refined.endswith(".")


def test_wrong_answers_are_wrong(source):
    for number in range(0, len(source), len(source) // 50):
        questions = source.example(number, number).questions
        assert len(questions) >= 3
        assert len({question.question for question in questions}) == len(questions)
        assert all(question.answer != question.wrong for question in questions)
        assert all(question.answer and question.wrong for question in questions)


def test_the_sizes(source):
    kinds = {open_pictures(name): size for name, size in KINDS.items() if name != "digits" or "sklearn" in sys.modules}
    assert len(source) == kinds[source] or kinds[source] is None
    assert 250 <= len(WORDS) == len(set(WORDS))
    assert all(word.isascii() and word.islower() and 2 <= len(word) <= 5 for word in WORDS)


def test_pictures_and_documents_are_held_out_alike(source):
    training, held_out = split_pictures(source, 0.1)
    assert sorted([*training, *held_out]) == list(range(len(source)))
    documents = [Document("", f"{source.name_of(number)}#2") for number in range(len(source))]
    assert {document.origin for document in split(documents, 0.1)[1]} == {
        f"{source.name_of(number)}#2" for number in held_out
    }
    assert len(split_pictures(source, 0)[1]) == 0
    with pytest.raises(UserError, match="0 <= held_out < 1"):
        split_pictures(source, 1)


def test_examples_do_not_change_between_versions():
    picture = ChartPictures().example(0, 0)
    assert picture.caption == "bar chart, Mar 14, Jun 13, Aug 12, Sep 9, Nov 11"
    assert picture.questions[0][:2] == ("Name the largest bar.", "Mar")


def test_questions_on_a_chart_are_answered_by_its_bars():
    for number in range(40):
        picture = ChartPictures().example(number, number)
        listed = picture.caption.removeprefix("bar chart, ").split(", ")
        bars = {label: int(value) for label, value in (bar.split() for bar in listed)}
        largest, value, count, smallest = picture.questions
        assert bars[largest.answer] == int(value.answer) == max(bars.values()) > bars[largest.wrong]
        assert bars[smallest.answer] == min(bars.values())
        assert int(count.answer) == len(bars) in (3, 4, 5, 6)
        assert len(set(bars.values())) == len(bars)


def test_bars_are_as_high_as_their_values():
    picture = ChartPictures().example(0, 0)
    values = [int(bar.split()[1]) for bar in picture.caption.removeprefix("bar chart, ").split(", ")]
    pixels = np.asarray(picture.image).astype(int)
    ink = min(INKS.values(), key=lambda ink: -(abs(pixels - ink).sum(-1) < 10).sum())
    is_ink = abs(pixels - ink).sum(-1) < 10
    middles = [int(pixels.shape[1] * (0.01 + 0.98 * (place + 0.5) / len(values))) for place in range(len(values))]
    # The longest run, because what is written above and below a bar may have its colour.
    runs = ["".join("x" if each else " " for each in is_ink[:, middle]).split() for middle in middles]
    heights = np.array([max(map(len, column)) for column in runs])
    assert heights / heights.max() == pytest.approx(np.array(values) / max(values), abs=0.02)


def test_the_background_is_the_colour_that_is_asked_for(source):
    if isinstance(source, ChartPictures):
        return
    for variant in range(5):
        picture = source.example(7, variant)
        colours = picture.image.getcolors(2**16)
        assert max(colours)[1] == PAPERS[picture.questions[1].answer]


def test_digits_are_the_scans_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    source = open_pictures("digits")
    for number in (0, 5, 1796):
        picture = source.example(number, 0)
        assert picture.questions[0].answer == str(datasets.load_digits().target[number])
        assert picture.questions[2].answer == ("odd" if int(picture.questions[0].answer) % 2 else "even")


def test_every_word_font_draws_all_letters():
    for name in FONTS:
        font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", 30)
        missing = write("\ue000", font, (0, 0, 0)).tobytes()
        letters = [write(letter, font, (0, 0, 0)).tobytes() for letter in "abcdefghijklmnopqrstuvwxyz"]
        assert len({*letters, missing}) == 27


def test_a_figure_is_wholly_on_its_paper():
    from random import Random

    figure = Image.new("RGBA", (30, 10), (0, 0, 0, 255))
    for seed in range(20):
        image = place(figure, (40, 50), (255, 255, 255), Random(seed), angle=0, smallest=0.5)
        black = np.asarray(image)[..., 0] < 128
        height, width = black.any(1).sum(), black.any(0).sum()
        assert 19 <= width <= 40
        assert width / height == pytest.approx(3, rel=0.25)


@pytest.mark.parametrize("name", ["cats", "digits:/some/font.ttf", ""])
def test_other_pictures(name):
    with pytest.raises(UserError, match=r"no pictures called '.*': take emoji, digits, words, charts or emoji:/path"):
        open_pictures(name)


def test_digits_without_scikit_learn(monkeypatch):
    open_pictures.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"scikit-learn, which is not installed: pip install 'fulmen\[vision\]'"):
        open_pictures("digits")
