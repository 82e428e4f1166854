"""Right answers are counted as right, noise is noise, and what is asked about is what training holds out."""

import json

import numpy as np
import pytest

from fulmen.checkpoint import make_tiny
from fulmen.cli import main
from fulmen.config import UserError
from fulmen.data.pictures import open_pictures, split_pictures
from fulmen.evals import answers
from fulmen.evals.answers import accuracy, answer_table, ask_about, load_engine
from fulmen.evals.pictures import choose_pictures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing") / "tiny"
    make_tiny(folder, vision=True)
    return folder


def test_only_what_training_holds_out_is_asked_about():
    source = open_pictures("words")
    training, held_out = ({source.name_of(n) for n in part} for part in split_pictures(source, 0.05))
    assert {p.name for p in choose_pictures("words", held_out=0.05, count=40)} <= held_out
    assert {p.name for p in choose_pictures("words", held_out=0.05, count=40, known=True)} <= training
    with pytest.raises(UserError, match="no pictures of words are held out"):
        choose_pictures("words", held_out=0, count=4)


def test_noise_has_the_pictures_size_and_question():
    (asked,) = ask_about("words", held_out=0.05, count=1)
    noise = asked.unseen(1)
    assert (noise.image.size, noise.question, noise.answer) == (asked.image.size, asked.question, asked.answer)
    assert np.asarray(noise.image).std() > 60
    assert np.asarray(asked.unseen(2).image).tolist() != np.asarray(noise.image).tolist()


def test_answers_are_compared_as_texts(monkeypatch):
    asked = ask_about("words", held_out=0.05, count=4)
    said = [asked[0].answer.upper(), f" {asked[1].answer}.\n", asked[2].answer + "x", ""]
    monkeypatch.setattr(answers, "answers", lambda engine, asked: said)
    assert accuracy(None, asked) == 0.5


def test_the_table(checkpoint):
    engine = load_engine(checkpoint, device="cpu", thumbnail=True)
    assert not engine.image_processor.dynamic
    (row,) = answer_table(engine, ["words"], held_out=0.05, count=3)
    assert row == {"pictures": "words", "held out": 0, "known": 0, "noise": 0, "asked": 3}  # the model is random


def test_a_model_that_sees_nothing_is_refused(tmp_path):
    make_tiny(tmp_path / "blind")
    with pytest.raises(UserError, match="takes no images"):
        load_engine(tmp_path / "blind", device="cpu")


def test_the_verb(checkpoint, tmp_path, capsys):
    arguments = ["--device", "cpu", "--pictures", "words", "--count", "2", "--json", str(tmp_path / "found.json")]
    with pytest.raises(SystemExit) as end:
        main(["eval", "answers", str(checkpoint), *arguments])
    assert end.value.code == 0
    assert "pictures: words  held out: 0.000" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())[0]["asked"] == 2


@pytest.mark.parametrize("task", ["answers", "encoder", "text"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(task, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["eval", task, str(tmp_path / "none"), "--json", str(tmp_path / "missing" / "found.json")])
    assert end.value.code == 2
    assert "missing is no folder to write found.json into" in capsys.readouterr().err
