"""Pictures as documents: drawn only when asked for, held out by the example, partners on the same side."""

import matplotlib
import pytest
from PIL import Image

from fulmen.config import UserError
from fulmen.data.chat import images_of
from fulmen.data.documents import file_of
from fulmen.data.pictures import SOURCES, charts, open_pictures, split_pictures
from fulmen.data.pictures.shelves import DOCUMENTS, RENDERINGS
from fulmen.data.preferences import read_preferences
from fulmen.data.sources import read_documents, split

STAND_IN = f":{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"


def text_of(message):
    parts = message["content"]
    return parts if isinstance(parts, str) else parts[-1]["text"]


def test_captions_are_raw_or_refined():
    documents = read_documents(["charts-captions"])
    assert len(documents) == len(open_pictures("charts")) * RENDERINGS
    refined = 0
    for index in range(200):
        document = documents[index]
        picture = open_pictures("charts").example(*divmod(index, RENDERINGS))
        asked, answered = document.messages
        assert [part["type"] for part in asked["content"]] == ["image", "text"]
        assert answered["content"] in (picture.caption, picture.refined)
        assert ("keywords" in text_of(asked) or "words" in text_of(asked)) == (answered["content"] == picture.caption)
        refined += answered["content"] == picture.refined
    assert 70 < refined < 130
    assert document.origin == "charts/49#200"
    assert document.text.startswith("<beginning_of_sentence>user name=user\n<image>")


def test_questions_with_their_answers():
    documents = read_documents(["words-questions"])
    first = captions = 0
    for index in range(200):
        picture = open_pictures("words").example(*divmod(index, RENDERINGS))
        messages = documents[index].messages
        turns = {text_of(asked): text_of(answer) for asked, answer in zip(messages[::2], messages[1::2], strict=True)}
        assert [isinstance(message["content"], str) for message in messages] == [False, True, False, True]
        assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
        questions = {question.question: question.answer for question in picture.questions}
        assert turns.pop(picture.questions[0].question) == picture.questions[0].answer
        ((other, answer),) = turns.items()
        captions += (is_caption := answer in (picture.caption, picture.refined))
        assert is_caption or questions[other] == answer
        first += text_of(messages[0]) == picture.questions[0].question
    assert 70 < first < 130
    assert 70 < captions < 130


def test_texts_say_what_the_picture_would_show():
    documents = read_documents(["words-texts"])
    kinds = {"question": 0, "refined": 0, "caption": 0}
    for index in range(100):
        picture = open_pictures("words").example(*divmod(index, RENDERINGS))
        asked, answered = (message["content"] for message in documents[index].messages)
        assert picture.refined in asked or picture.caption in asked
        if asked.startswith(picture.refined):
            question = asked.removeprefix(picture.refined).strip()
            assert {q.question: q.answer for q in picture.questions}[question] == answered
            kinds["question"] += 1
        else:
            kinds["refined" if answered == picture.refined else "caption"] += 1
            assert answered in (picture.refined, picture.caption)
            assert answered not in asked
    assert min(kinds.values()) > 10


def test_images_are_those_of_the_example():
    document = read_documents(["words-questions"])[5]
    (image,) = images_of(document.messages)
    assert image.tobytes() == open_pictures("words").example(1, 1).image.tobytes()


def test_nothing_is_drawn_before_it_is_asked_for(monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "_draw", lambda *arguments: drawn.append(1) or Image.new("RGB", (1, 1)))
    documents = read_documents(["charts-dialogues"])
    messages = documents[0].messages
    assert not drawn
    assert len(images_of(messages)) == len(drawn) > 0


def test_dialogues_have_several_turns_and_sometimes_a_second_picture():
    documents = read_documents(["words-dialogues"])
    counts = {1: 0, 2: 0}
    for index in range(100):
        messages = documents[index].messages
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        parts = [part for message in messages[::2] for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        assert messages[0]["content"][0]["type"] == "image"
        assert len(messages) // 2 - len(images) + 1 in (2, 3)
        counts[len(images)] += 1
    assert min(counts.values()) > 30


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_no_training_dialogue_shows_a_held_out_picture(share, monkeypatch):
    source = open_pictures("words")
    held_out = {source.name_of(number) for number in split_pictures(source, share)[1]}
    training, rest = split(read_documents(["words-dialogues"]), share)
    assert {file_of(rest.origin(index)) for index in range(len(rest))} == held_out
    shown = []
    example = type(source).example
    monkeypatch.setattr(
        type(source), "example", lambda self, *place: shown.append(self.name_of(place[0])) or example(self, *place)
    )
    for index in range(0, len(training), 50):
        training[index]
    assert len(set(shown)) > 100
    assert not set(shown) & held_out


def test_preference_pairs_prefer_the_right_answer():
    pairs = read_preferences(["charts-preferences"])
    for index in range(50):
        pair, picture = pairs[index], open_pictures("charts").example(*divmod(index, RENDERINGS))
        (asked,) = pair.messages
        answers = {question.question: (question.answer, question.wrong) for question in picture.questions}
        assert answers[text_of(asked)] == (pair.chosen, pair.rejected)
        assert pair.text.endswith(f"ai name=assistant\n{pair.chosen}\n{pair.rejected}")
    training, held_out = split(pairs, 0.1)
    assert len(training) + len(held_out) == len(pairs)
    assert pair.origin == "charts/12#50"


def test_all_kinds_together_and_a_font_of_ones_own(monkeypatch):
    few = len(open_pictures(f"emoji{STAND_IN}"))
    assert len(read_documents([f"emoji-captions{STAND_IN}"])) == few * (DOCUMENTS // few)
    for kind in ("emoji", "digits"):
        monkeypatch.setitem(SOURCES, kind, SOURCES["charts"])
    open_pictures.cache_clear()
    documents = read_documents(["pictures-questions"])
    open_pictures.cache_clear()
    kinds = {documents.origin(index).partition("/")[0] for index in range(len(documents))}
    assert kinds == {"charts", "words"}
    assert len(documents) == RENDERINGS * (3 * 4096 + len(open_pictures("words")))


def test_names_that_were_meant():
    with pytest.raises(
        UserError, match=r"no file matches 'emoji': .* stdlib, .* emoji-captions, .* pictures-dialogues"
    ):
        read_documents(["emoji"])
    with pytest.raises(UserError, match=r"one of emoji-preferences, digits-preferences, .* pictures-preferences$"):
        read_preferences(["emoji-captions"])
    with pytest.raises(UserError, match="no file matches 'cats-captions'"):
        read_documents(["cats-captions"])
    with pytest.raises(UserError, match=r"no pictures called 'words:/a\.ttf'"):
        read_documents(["words-captions:/a.ttf"])
    with pytest.raises(UserError, match=r"no pictures called 'pictures:/a\.ttf'"):
        read_documents(["pictures-captions:/a.ttf"])
