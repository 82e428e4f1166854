"""Pairs as packed batches: what counts, what is cut, the order, exact resuming."""

import json
from itertools import pairwise

import pytest
import torch

from fulmen.align.pairs import PairEncoder, PairLoader, held_out_pairs
from fulmen.config import UserError
from fulmen.data import ImageProcessor, Tokenizer
from fulmen.data.documents import PreferencePair

PROCESSOR = ImageProcessor(crop_size=28, patch_size=14)


@pytest.fixture
def encoder(tokenizer):
    return PairEncoder(tokenizer=tokenizer, sequence_length=64, images=PROCESSOR)


def counted(tokenizer, batch):
    """The text whose tokens count, of each sample."""
    borders = batch.cu_seqlens.tolist()
    rows = [batch.targets[0, a:b] for a, b in pairwise(borders)]
    return [tokenizer.decode(row[row >= 0].tolist(), skip_special=False) for row in rows]


def test_a_batch_has_either_answer_in_turn_and_counts_them_alone(tokenizer, encoder, pairs):
    batch = encoder.batch(pairs[:2])
    answers = [answer for pair in pairs[:2] for answer in (pair.chosen, pair.rejected)]
    assert counted(tokenizer, batch) == [f"{answer}<end_of_sentence>" for answer in answers]
    first, second = batch.cu_seqlens[:2].tolist(), batch.cu_seqlens[1:3].tolist()
    prompt = len(batch.targets[0, slice(*second)]) - 1 - len(tokenizer.encode("no"))
    assert torch.equal(batch.tokens[0, first[0] : prompt], batch.tokens[0, second[0] : second[0] + prompt])


def test_images_are_shared_by_both_answers(tokenizer, encoder, shown):
    batch = encoder.batch(shown[:2])
    assert len(batch.images) == 4
    assert batch.images[0].image is batch.images[1].image
    assert batch.images[1].image is not batch.images[2].image
    places = [p for placed in batch.images for p in range(placed.start, placed.start + placed.count)]
    assert (batch.tokens[0] == tokenizer.image_id).nonzero().flatten().tolist() == places
    blind = PairEncoder(tokenizer=tokenizer, sequence_length=64)
    with pytest.raises(UserError, match=r"^shown#0: it has an image, and the model sees none"):
        blind.batch(shown[:1])


def test_what_is_too_long_loses_its_end(tokenizer, encoder):
    long = PreferencePair(({"role": "user", "content": "what?"},), "one " * 100, "two", "pairs#7")
    batch = encoder.batch([long])
    assert batch.cu_seqlens.diff()[0] == 64
    assert counted(tokenizer, batch)[0] == ("one " * 100)[: len(counted(tokenizer, batch)[0])]
    endless = PreferencePair(({"role": "user", "content": "what? " * 100},), "one", "two", "pairs#8")
    with pytest.raises(UserError, match=r"^pairs#8: the conversation fills data\.sequence_length = 64 and leaves no"):
        encoder.batch([endless])


def described(batch):
    images = [(placed.image.digest, placed.start, placed.first, placed.count) for placed in batch.images]
    return batch.tokens.tolist(), batch.targets.tolist(), batch.cu_seqlens.tolist(), images


def test_processes_that_read_ahead_change_nothing(encoder, shown):
    """Neither the batches, of whatever size, nor that both answers share their image."""
    here, there = PairLoader(shown, encoder, seed=3), PairLoader(shown, encoder, seed=3, workers=2)
    sizes = (7, 7, 2, 7, 7, 2)
    batches = [described(here.next_batch(size)) for size in sizes]
    assert [described(there.next_batch(size)) for size in sizes] == batches
    resumed = PairLoader(shown, encoder, seed=3, workers=1)
    resumed.load_state_dict(there.state_dict())
    batch = resumed.next_batch(7)
    assert described(batch) == described(here.next_batch(7))
    assert batch.images[0].image is batch.images[1].image


def test_resuming_at_any_step_gives_the_same_batches(encoder, tokenizer, pairs):
    loader = PairLoader(pairs, encoder, seed=3)
    states, batches, epochs = [], [], []
    for _ in range(12):
        states.append(json.dumps(loader.state_dict()))
        batches.append(described(loader.next_batch(6)))
        epochs.append(loader.epoch)
    assert epochs == [0] * 4 + [1] * 4 + [2] * 4
    for turn, state in enumerate(states):
        resumed = PairLoader(pairs, encoder, seed=3)
        resumed.load_state_dict(json.loads(state))
        assert [described(resumed.next_batch(6)) for _ in range(12 - turn)] == batches[turn:]
    assert described(PairLoader(pairs, encoder, seed=4).next_batch(6)) != batches[0]


def test_an_epoch_has_no_pair_twice(encoder, pairs, monkeypatch):
    met = []
    samples = PairEncoder.samples
    monkeypatch.setattr(PairEncoder, "samples", lambda self, pair: met.append(pair.origin) or samples(self, pair))
    loader = PairLoader(pairs, encoder, seed=0)
    for _ in range(10):
        loader.next_batch(5)
    assert sorted(met[:24]) == sorted(met[24:48]) == sorted(pair.origin for pair in pairs)
    assert met[:24] != met[24:48]


@pytest.mark.parametrize(
    ("change", "key"), [("pairs", "pairs"), ("seed", "seed"), ("length", "sequence_length"), ("tokenizer", "tokenizer")]
)
def test_a_state_of_other_data_is_refused(encoder, tokenizer, pairs, change, key):
    state = PairLoader(pairs, encoder, seed=3).state_dict()
    changed = {
        "pairs": lambda: PairLoader(pairs[1:], encoder, seed=3),
        "seed": lambda: PairLoader(pairs, encoder, seed=4),
        "length": lambda: PairLoader(pairs, PairEncoder(tokenizer=tokenizer, sequence_length=65), seed=3),
        "tokenizer": lambda: PairLoader(
            pairs, PairEncoder(tokenizer=Tokenizer.train(["other"], 262), sequence_length=64), seed=3
        ),
    }
    with pytest.raises(UserError, match=rf"the data is not that of the snapshot: {key} was"):
        changed[change]().load_state_dict(state)
    with pytest.raises(UserError, match="this is not the state of a loader of pairs"):
        PairLoader(pairs, encoder, seed=3).load_state_dict({})


def test_no_pairs(encoder):
    with pytest.raises(UserError, match="there are no preference pairs to train on"):
        PairLoader([], encoder, seed=0)


def test_held_out_pairs_are_spread_and_at_most_so_many(encoder, pairs, monkeypatch):
    monkeypatch.setattr(PairEncoder, "batch", lambda self, chosen: [pair.origin for pair in chosen])
    batches = held_out_pairs(pairs, encoder, count=10, batch=4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    rows = sorted(int(origin.split("#")[1]) for batch in batches for origin in batch)
    assert len(set(rows)) == 10
    assert rows[0] < 6
    assert rows[-1] > 17
    assert sum(map(len, held_out_pairs(pairs, encoder, count=100, batch=7))) == 24
