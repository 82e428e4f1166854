"""Packing as a pure function: every document exactly once, right targets and borders, any sizes, from any position."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.data.encoding import Encoded
from fulmen.data.images import PlacedImage
from fulmen.data.packing import Position, pack_row

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=12)
SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=5)


def plain(ids):
    return Encoded(ids, ids)


def stream_of(lengths, epochs=1):
    """Documents whose ids name the document and the place in it, so that no two tokens are alike."""
    documents = [plain(torch.arange(length) + 1000 * number) for number, length in enumerate(lengths)]
    return lambda epoch, number: documents[number] if epoch < epochs and number < len(documents) else None


def rows_of(stream, position, sizes, **layout):
    """All rows from a position on; the sizes come round and round."""
    rows, turn = [], 0
    while True:
        batch, position = pack_row(stream, position, batch_tokens=sizes[turn % len(sizes)], **layout)
        if batch is None:
            return rows, position
        rows.append((batch, position))
        turn += 1


def samples_of(batch):
    tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
    borders = batch.cu_seqlens.tolist()
    return [(tokens[a:b], targets[a:b]) for a, b in pairwise(borders)]


def test_the_example_of_the_docstring():
    documents = [plain(torch.tensor([7, 8, 9])), plain(torch.tensor([7, 5]))]
    stream = lambda epoch, number: documents[number] if epoch == 0 and number < 2 else None  # noqa: E731
    batch, position = pack_row(stream, Position(), batch_tokens=3, sequence_length=8)
    assert batch.tokens.tolist() == [[7, 8, 7]]
    assert batch.targets.tolist() == [[8, 9, 5]]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert (batch.tokens.dtype, batch.targets.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64, torch.int32)
    assert pack_row(stream, position, batch_tokens=3, sequence_length=8)[0] is None


def test_a_cut_sample_goes_on_in_the_next_row_and_targets_reach_over_cuts():
    stream = stream_of([8, 3])
    rows, _ = rows_of(stream, Position(), [5], sequence_length=3)
    assert [samples_of(batch) for batch, _ in rows] == [
        [([0, 1, 2], [1, 2, 3]), ([3, 4], [4, 5])],
        [([5, 6], [6, 7]), ([1000, 1001], [1001, 1002])],
    ]
    # Side by side: the row's end cuts the second document, which then goes on before the first.
    rows, _ = rows_of(stream_of([6, 8]), Position(), [5], sequence_length=3, interleave=2)
    assert [[tokens for tokens, _ in samples_of(batch)] for batch, _ in rows] == [
        [[0, 1, 2], [1000, 1001]],
        [[1002, 1003, 1004], [3, 4]],
        [[1005, 1006]],
    ]


@settings(max_examples=200, deadline=None)
@given(LENGTHS, SIZES, st.integers(1, 20), st.integers(1, 5), st.integers(1, 3))
def test_each_document_exactly_once_per_epoch(lengths, sizes, sequence_length, interleave, epochs):
    layout = {"sequence_length": sequence_length, "interleave": interleave}
    rows, _ = rows_of(stream_of(lengths, epochs), Position(), sizes, **layout)
    batches = [batch for batch, _ in rows]
    for turn, batch in enumerate(batches):
        borders = batch.cu_seqlens.tolist()
        assert borders[0] == 0
        assert borders[-1] == batch.tokens.shape[1] == batch.targets.shape[1]
        assert all(0 < end - start <= sequence_length for start, end in pairwise(borders))
        if turn < len(batches) - 1:
            assert batch.tokens.shape == (1, sizes[turn % len(sizes)])
        for tokens, targets in samples_of(batch):
            assert targets == [token + 1 for token in tokens]
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
    everything = torch.cat([batch.tokens[0] for batch in batches]).tolist()
    one_epoch = [1000 * number + place for number, length in enumerate(lengths) for place in range(length - 1)]
    for epoch in range(epochs):
        part = everything[epoch * len(one_epoch) : (epoch + 1) * len(one_epoch)]
        assert sorted(part) == one_epoch
        # Within a document the order is kept, and without interleaving the documents' order too.
        for number in range(len(lengths)):
            inside = [token for token in part if token // 1000 == number]
            assert inside == sorted(inside)
        assert interleave > 1 or part == one_epoch
    assert len(everything) == epochs * len(one_epoch)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, SIZES, st.integers(1, 20), st.integers(1, 5), st.floats(0, 1, exclude_max=True))
def test_any_position_gives_the_rows_that_were_to_come(lengths, sizes, sequence_length, interleave, where):
    layout = {"sequence_length": sequence_length, "interleave": interleave}
    rows, _ = rows_of(stream_of(lengths, 2), Position(), sizes, **layout)
    turn = int(where * len(rows))
    rotated = [sizes[(turn + 1 + place) % len(sizes)] for place in range(len(sizes))]
    again, _ = rows_of(stream_of(lengths, 2), rows[turn][1], rotated, **layout)
    assert [samples_of(batch) for batch, _ in again] == [samples_of(batch) for batch, _ in rows[turn + 1 :]]


def test_interleaving_mixes_documents_within_a_row():
    batch, _ = pack_row(stream_of([100] * 8), Position(), batch_tokens=64, sequence_length=8, interleave=8)
    assert {token // 1000 for token in batch.tokens[0].tolist()} == set(range(8))


IMAGE = 7


@st.composite
def seeing(draw):
    """Documents of runs of text and of images: the same ids as above, IMAGE in the places of images."""
    documents = []
    for number, runs in enumerate(
        draw(st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=6), min_size=1, max_size=6))
    ):
        ids = torch.arange(sum(runs) + 2) + 1000 * (number + 1)
        images, place = [], 1
        for turn, run in enumerate(runs):
            if turn % 2:
                # Packing looks at no pixel.
                images.append(PlacedImage(object(), place, 0, run))
            place += run
        labels = ids.clone()
        for placed in images:
            ids[placed.start : placed.start + placed.count] = IMAGE
            labels[placed.start : placed.start + placed.count] = -100
        documents.append(Encoded(ids, labels, tuple(images)))
    return documents


@settings(max_examples=200, deadline=None)
@given(seeing(), SIZES, st.integers(1, 20), st.integers(1, 3))
def test_images_lie_where_their_tokens_are_and_each_position_comes_once(documents, sizes, sequence_length, interleave):
    stream = lambda epoch, number: documents[number] if epoch == 0 and number < len(documents) else None  # noqa: E731
    rows, _ = rows_of(stream, Position(), sizes, sequence_length=sequence_length, interleave=interleave)
    met = {}
    for batch, _ in rows:
        tokens, targets = batch.tokens[0], batch.targets[0]
        marked = torch.zeros(len(tokens), dtype=torch.bool)
        for placed in batch.images:
            marked[placed.start : placed.start + placed.count] = True
            met.setdefault(id(placed.image), []).extend(range(placed.first, placed.first + placed.count))
        assert torch.equal(marked, tokens == IMAGE)
        assert (targets != IMAGE).all()
    whole = {id(placed.image): list(range(placed.count)) for document in documents for placed in document.images}
    assert met == whole
    counted = torch.cat([batch.targets[0] for batch, _ in rows])
    expected = torch.cat([document.labels[1:] for document in documents])
    assert sorted(counted.tolist()) == sorted(expected.tolist())


def test_a_rows_end_within_an_image():
    image = object()
    ids = torch.tensor([1, 2, IMAGE, IMAGE, IMAGE, IMAGE, 3, 4])
    document = Encoded(ids, torch.where(ids == IMAGE, -100, ids), (PlacedImage(image, 2, 0, 4),))
    stream = lambda epoch, number: document if epoch == number == 0 else None  # noqa: E731
    (first, _), (second, _) = rows_of(stream, Position(), [4], sequence_length=100)[0]
    assert first.tokens.tolist() == [[1, 2, IMAGE, IMAGE]]
    assert first.targets.tolist() == [[2, -100, -100, -100]]
    assert first.images == (PlacedImage(image, 2, 0, 2),)
    assert second.tokens.tolist() == [[IMAGE, IMAGE, 3]]
    assert second.targets.tolist() == [[-100, 3, 4]]
    assert second.images == (PlacedImage(image, 0, 2, 2),)
