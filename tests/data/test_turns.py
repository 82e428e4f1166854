"""The order of documents, and text mixed in evenly."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulmen.data import Document
from fulmen.data.turns import Order, Turns


def documents(kind, count):
    return [Document("", f"{kind}{number}") for number in range(count)]


def epoch_of(turns, epoch):
    return [turns.document(epoch, turn) for turn in range(len(turns))]


@given(st.integers(1, 40), st.integers(0, 99), st.integers(0, 3))
def test_an_order_has_each_number_once(count, seed, epoch):
    order = Order(count, seed)
    assert sorted(order.pick(epoch, turn) for turn in range(count)) == list(range(count)) == list(range(len(order)))


def test_orders_differ_by_seed_and_epoch():
    drawn = {
        (seed, epoch): [Order(50, seed).pick(epoch, turn) for turn in range(50)] for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(set(map(tuple, drawn.values()))) == 4
    again = Order(50, 0)
    assert [again.pick(1, turn) for turn in range(50)] == drawn[0, 1]
    assert [again.pick(0, turn) for turn in range(50)] == drawn[0, 0]


@given(st.integers(1, 60), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 25))
def test_a_text_before_every_so_many_documents(num_documents, sizes, every):
    turns = Turns(
        documents("d", num_documents), 5, [documents(f"t{source}.", size) for source, size in enumerate(sizes)], every
    )
    plain = Turns(documents("d", num_documents), 5)
    met = []
    for epoch in range(3):
        drawn = epoch_of(turns, epoch)
        assert [document for document, number in drawn if number is None] == [d for d, _ in epoch_of(plain, epoch)]
        places = [place for place, (_, number) in enumerate(drawn) if number is not None]
        assert places == list(range(0, len(drawn), every + 1))
        met += [drawn[place] for place in places]
    assert len(met) == 3 * -(-num_documents // every)
    for source, size in enumerate(sizes):
        # Sources take turns and have epochs of their own: no text comes again before all others of it have come.
        mine = met[source :: len(sizes)]
        assert [number for _, number in mine] == list(range(len(mine)))
        counts = Counter(document.origin for document, _ in mine)
        assert all(origin.startswith(f"t{source}.") for origin in counts)
        assert max(counts.values(), default=0) - min([*counts.values(), *[0] * (size - len(counts))]) <= 1


@pytest.mark.parametrize("count", [1, 7])
def test_without_texts_there_are_none(count):
    turns = Turns(documents("d", count), 0)
    assert len(turns) == count
    assert {number for _, number in epoch_of(turns, 0)} == {None}
