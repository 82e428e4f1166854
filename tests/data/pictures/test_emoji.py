"""Emoji: which of a font's are taken, under which names, and what is said where the font is missing."""

from pathlib import Path

import matplotlib
import pytest

from fulmen.config import UserError
from fulmen.data.pictures import emoji, open_pictures, split_pictures
from fulmen.data.pictures.emoji import ANNOTATIONS, FONTS, EmojiPictures, _sentence

STAND_IN = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
needs_debian = pytest.mark.skipif(
    not FONTS[0].is_file() or not (ANNOTATIONS / "annotations" / "en.xml").is_file(),
    reason="needs Debian's fonts-noto-color-emoji and unicode-cldr-core",
)


def write_annotations(folder, part, annotations):
    """annotations: {sequence: (keywords, name)}."""
    lines = [
        f'<annotation cp="{sequence}">{keywords}</annotation><annotation cp="{sequence}" type="tts">{name}</annotation>'
        for sequence, (keywords, name) in annotations.items()
    ]
    (folder / part).mkdir(parents=True)
    text = f"<ldml><annotations>{''.join(lines)}</annotations></ldml>"
    (folder / part / "en.xml").write_text(text, encoding="utf-8")


def names_of(source):
    return {source.name_of(number): source.example(number, 0).questions[0].answer for number in range(len(source))}


def test_names_and_keywords_come_from_the_cldr(tmp_path):
    write_annotations(tmp_path, "annotations", {"😀": ("face | grin", "grinning face"), "☃": ("cold", "snowman")})
    write_annotations(tmp_path, "annotationsDerived", {"☂": ("rain | umbrella", "umbrella")})
    source = EmojiPictures(STAND_IN, tmp_path)
    assert names_of(source) == {"emoji/1f600": "grinning face", "emoji/2603": "snowman", "emoji/2602": "umbrella"}
    assert source.example(0, 0).caption == "face, grin, grinning face"
    assert source.example(0, 0).refined == "A picture of a grinning face."
    assert source.example(2, 0).caption == "rain, umbrella"


def test_left_out_is_what_is_text_or_blank_or_several_glyphs_or_looks_like_another(tmp_path):
    taken = {"😀": ("", "grinning face"), "☃": ("", "snowman")}
    # DejaVu Sans has neither the panda nor one glyph for the two characters.
    left_out = {"#": ("", "hash"), "\u3000": ("", "blank"), "😀\u200d☃": ("", "two"), "🐼": ("", "panda")}
    same = {"Ω": ("", "ohm sign as a letter"), "\N{OHM SIGN}": ("", "ohm")}
    write_annotations(tmp_path, "annotations", taken | left_out | same)
    write_annotations(tmp_path, "annotationsDerived", {})
    assert list(names_of(EmojiPictures(STAND_IN, tmp_path)).values()) == ["grinning face", "snowman", "ohm"]


def test_without_the_cldr_characters_have_their_names_from_python(tmp_path):
    names = names_of(EmojiPictures(STAND_IN, tmp_path))
    assert names["emoji/1f600"] == "grinning face"
    assert names["emoji/2603"] == "snowman"
    assert all("-" not in name for name in names)


@needs_debian
def test_the_emoji_of_debian():
    source = open_pictures("emoji")
    names = names_of(source)
    assert 3500 <= len(source) <= 3800
    thumbs = [number for number in range(len(source)) if source.name_of(number) == "emoji/1f44d"]
    asked = [source.example(number, 0).questions[0] for number in thumbs]
    assert "thumbs up: medium skin tone" in {question.answer for question in asked}
    assert len(asked) == 6
    assert names["emoji/1f468-200d-1f469-200d-1f467"] == "family: man, woman, girl"
    assert names["emoji/1f1f3-1f1f4"] == "flag: Norway"
    # These islands fly the flag of Norway.
    assert "flag: Bouvet Island" not in names.values()
    assert not {"emoji/23", "emoji/2a", "emoji/31"} & set(names)


@needs_debian
def test_no_held_out_name_is_a_wrong_answer_in_training():
    source = open_pictures("emoji")
    training, held_out = split_pictures(source, 0.05)
    hidden = {source.example(int(number), 0).questions[0].answer for number in held_out}
    for number in training[::7]:
        assert source.example(int(number), 1).questions[0].wrong not in hidden


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("grinning face", "A picture of a grinning face."),
        ("octopus", "A picture of an octopus."),
        ("clapping hands: dark skin tone", "A picture of clapping hands with dark skin tone."),
        ("flag: Norway", "A picture of the flag of Norway."),
        ("glass", "A picture of a glass."),
    ],
)
def test_sentences(name, sentence):
    assert _sentence(name) == sentence


def test_no_font_no_emoji(tmp_path, monkeypatch):
    packages = r"apt-get install fonts-noto-color-emoji unicode-cldr-core libfribidi0, or name a font"
    monkeypatch.setattr(emoji, "FONTS", (tmp_path / "none.ttf",))
    with pytest.raises(UserError, match=f"no colour emoji font is installed: {packages}"):
        EmojiPictures()
    with pytest.raises(UserError, match=rf"cannot read the font .*none\.ttf at 109 pixels \(.*\): {packages}"):
        EmojiPictures(tmp_path / "none.ttf")
    with pytest.raises(UserError, match=rf"the font .*cmtt10\.ttf draws no emoji: {packages}"):
        EmojiPictures(STAND_IN.with_name("cmtt10.ttf"), tmp_path)
