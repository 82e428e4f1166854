"""Packing as a pure function: every document exactly once, right targets and borders, any sizes, from any position."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.data.packing import Position, pack_row

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=12)
SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=5)


def stream_of(lengths, epochs=1):
    """Documents whose ids name the document and the place in it, so that no two tokens are alike."""
    documents = [torch.arange(length) + 1000 * number for number, length in enumerate(lengths)]
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
    documents = [torch.tensor([7, 8, 9]), torch.tensor([7, 5])]
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
