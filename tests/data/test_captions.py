"""Batches of captioned pictures: what is in them, in which order, and that they come again; tables of one's own."""

import dataclasses
import json
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from fulmen.config import UserError
from fulmen.data import Tokenizer
from fulmen.data.captions import (
    Captioned,
    CaptionLoader,
    caption_texts,
    encode_captions,
    held_out_captions,
    read_captioned,
)
from fulmen.data.images import ImageProcessor
from fulmen.data.pictures import UNSEEN_VARIANT, Picture


@dataclasses.dataclass
class Squares:
    """A source of squares of one colour, which tells number and variant."""

    name: str
    count: int

    def __len__(self):
        return self.count

    def name_of(self, number):
        return f"{self.name}/{number}"

    def example(self, number, variant):
        raw, refined = f"{self.name}, {number}", f"It shows {self.name} {number}."
        colour = (number, variant % 256, variant // 256 % 256)
        return Picture(self.name_of(number), raw, refined, (), lambda: Image.new("RGB", (20, 10), colour))


@pytest.fixture
def pictures():
    return Captioned((Squares("red", 7), Squares("blue", 9)), (np.array([0, 2, 4, 6]), np.arange(9)))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["It shows red 0. It shows blue 1. red, 3 and blue, 5"] * 9, 275)


@pytest.fixture
def loader(pictures, tokenizer):
    return lambda **options: CaptionLoader(
        pictures, tokenizer, **{"seed": 3, "max_caption": 12, "patch_size": 4} | options
    )


def colours(batch):
    """(number, variant) that the crops say."""
    return [tuple(colour) for colour in batch.crops[:, :2, 0, 0].tolist()]


def same(one, two):
    return one.captions == two.captions and all(
        torch.equal(getattr(one, name), getattr(two, name)) for name in ("crops", "tokens", "targets")
    )


def test_encoding(tokenizer):
    """bos and words, then words and eos; behind, targets that do not count; a caption too long has no end."""
    tokens, targets = encode_captions(tokenizer, ["red", "It shows blue 1.", "red"], 3)
    red, long = tokenizer.encode("red"), tokenizer.encode("It shows blue 1.")
    assert len(red) < 3 < len(long)
    assert tokens.shape == targets.shape == (3, 3)
    assert tokens[0, : len(red) + 1].tolist() == [tokenizer.bos_id, *red]
    assert targets[0].tolist() == [*red, tokenizer.eos_id, *[-100] * (2 - len(red))]
    assert tokens[1].tolist() == [tokenizer.bos_id, *long[:2]]
    assert targets[1].tolist() == long[:3]
    assert encode_captions(tokenizer, ["red"], 76)[0].shape == (1, len(red) + 1)


def test_an_epoch_takes_each_picture_once_and_the_next_in_another_variant(loader):
    stream = loader()
    seen = []
    for _ in range(13):
        batch = stream.next_batch(2, 8)
        assert batch.crops.shape == (2, 3, 8, 8)
        assert len(batch) == len(batch.captions) == 2
        seen += zip(batch.captions, colours(batch), strict=True)
    assert stream.epoch == 1
    first, second = seen[:13], seen[13:]
    for variant, epoch in enumerate((first, second)):
        found = sorted(caption.replace("It shows ", "").replace(",", "").rstrip(".") for caption, _ in epoch)
        assert found == sorted([*(f"red {n}" for n in (0, 2, 4, 6)), *(f"blue {n}" for n in range(9))])
        assert all(str(number) in caption and drawn == variant for caption, (number, drawn) in epoch)
    assert [caption for caption, _ in first] != [caption for caption, _ in second]


def test_raw_and_refined_captions_are_as_likely(tokenizer):
    many = Captioned((Squares("red", 200),), (np.arange(200),))
    stream = CaptionLoader(many, tokenizer, seed=0, max_caption=12, patch_size=4)
    kinds = {}
    for _ in range(10):
        for caption in stream.next_batch(200, 4).captions:
            number = caption.rstrip(".").split(" ")[-1]
            kinds.setdefault(number, []).append(caption.startswith("It"))
    refined = sum(map(sum, kinds.values()))
    assert abs(refined - 1000) < 4 * (2000 * 0.25) ** 0.5
    # Of one picture, now the one and now the other.
    assert sum(0 < sum(each) < 10 for each in kinds.values()) > 190


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_where_it_stood(loader, workers):
    """After any batch, also when the size has just changed, with processes that are ahead of it."""
    sizes = [(3, 8), (3, 8), (3, 8), (3, 12), (3, 12), (4, 12), (4, 12)]
    whole = loader(workers=workers)
    batches, states = [], []
    for size in sizes:
        states.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(whole.next_batch(*size))
    for start in (1, 3, 4, 6):
        stream = loader()
        stream.load_state_dict(states[start])
        assert all(same(stream.next_batch(*size), batches[start + n]) for n, size in enumerate(sizes[start:]))
    again = loader(seed=4)
    assert not same(again.next_batch(3, 8), batches[0])


def test_processes_end_before_others_begin(loader, monkeypatch):
    """Those that begin are copies of this process: with the others' handles in it, they would complain at their end."""
    running = []

    def spy(self, *shape):
        running.append(len(multiprocessing.active_children()))
        return open_stream(self, *shape)

    open_stream = CaptionLoader._open_stream
    monkeypatch.setattr(CaptionLoader, "_open_stream", spy)
    before = len(multiprocessing.active_children())
    stream = loader(workers=2)
    for size in (8, 12, 16):
        stream.next_batch(2, size)
        assert len(multiprocessing.active_children()) == before + 2
    assert running == [before] * 3


def test_no_random_number_of_the_program_is_used(loader):
    state = torch.get_rng_state()
    loader().next_batch(3, 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_data_is_refused(loader, pictures, tokenizer):
    state = loader().state_dict()
    other = Captioned(pictures.sources, (np.array([0, 2, 4, 5]), np.arange(9)))
    for stream, word in (
        (loader(seed=4), "seed was 3 and is 4"),
        (loader(max_caption=13), "max_caption"),
        (CaptionLoader(other, tokenizer, seed=3, max_caption=12, patch_size=4), "captions was"),
    ):
        with pytest.raises(UserError, match=word):
            stream.load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"taken": 3}, {"taken": "x", "identity": {}}, {"taken": 3, "identity": 5}])
def test_what_is_no_state_is_refused(loader, state):
    with pytest.raises(UserError, match="not the state of a loader of captions"):
        loader().load_state_dict(state)


def test_held_out_batches_are_fixed_and_spread_over_the_sources(pictures, tokenizer):
    processor = ImageProcessor(crop_size=8, patch_size=4, dynamic=False)
    settings = {"count": 6, "batch": 4, "max_caption": 12}
    (one, sources), (two, more) = held_out_captions(pictures, tokenizer, processor, **settings)
    assert (len(one), len(two)) == (4, 2)
    assert sources + more == [0, 1] * 3
    captions = one.captions + two.captions
    assert all(caption.startswith(f"It shows {('red', 'blue')[n % 2]}") for n, caption in enumerate(captions))
    assert len(set(captions)) == 6
    assert {variant for _, variant in colours(one)} == {UNSEEN_VARIANT % 256}
    again = list(held_out_captions(pictures, tokenizer, processor, **settings))
    assert same(again[0][0], one)
    settings["count"] = 100
    assert sum(len(batch) for batch, _ in held_out_captions(pictures, tokenizer, processor, **settings)) == 13


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of eight pictures; the last row's file is missing."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(8):
        if number < 7:
            Image.new("RGB", (9, 5), (number, 9, 0)).save(tmp_path / "pictures" / f"{number}.png")
        rows.append({"image": f"pictures/{number}.png", "caption": f"It shows green {number}."})
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_table_of_ones_own(table, tokenizer):
    training, held_out = read_captioned([str(table)], 0.3)
    assert training.count + held_out.count == 8
    assert 0 < held_out.count < 8
    assert len(list(caption_texts(training))) == training.count
    everything, nothing = read_captioned([str(table)], 0)
    assert (everything.count, nothing.count) == (8, 0)
    good = Captioned(everything.sources, (np.arange(7),))
    batch = CaptionLoader(good, tokenizer, seed=0, max_caption=12, patch_size=4).next_batch(7, 8)
    assert {(f"It shows green {number}.", (number, 9)) for number in range(7)} == set(
        zip(batch.captions, colours(batch), strict=True)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_one_clear_line(table, tokenizer, workers):
    everything, _ = read_captioned([str(table)], 0)
    stream = CaptionLoader(everything, tokenizer, seed=0, max_caption=12, patch_size=4, workers=workers)
    with pytest.raises(UserError, match=r"^cannot read the image .*7\.png: No such file or directory$"):
        stream.next_batch(8, 8)
    with pytest.raises(UserError, match=r"7\.png"):
        list(
            held_out_captions(
                everything,
                tokenizer,
                ImageProcessor(crop_size=8, patch_size=4, dynamic=False),
                count=8,
                batch=8,
                max_caption=12,
            )
        )


def test_sources_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no source of captioned pictures is named"):
        read_captioned([], 0.1)
    (tmp_path / "text.txt").write_text("words")
    training, _ = read_captioned([str(tmp_path / "text.txt")], 0)
    with pytest.raises(UserError, match="is no picture with a caption"):
        training.picture(0, 0)


def test_built_in_sources_by_name():
    training, held_out = read_captioned(["words", "charts", "words"], 0.05)
    assert [len(source) for source in training.sources] == [
        len(a) + len(b) for a, b in zip(training.numbers, held_out.numbers, strict=True)
    ]
    assert len(training.sources) == 2
    assert training.picture(0, 0).name.startswith("words/")
    assert training.picture(training.count - 1, 0).name.startswith("charts/")
    with pytest.raises(IndexError):
        training.place(training.count)
