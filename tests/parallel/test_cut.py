"""How a row is cut: every token held once, and what of a sample lies where, against a count token by token."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fulmen.config import UserError
from fulmen.parallel import Cut


@st.composite
def cuts(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    return Cut(tuple(borders), draw(st.integers(1, 6)), draw(st.booleans()))


def samples_of(cut):
    """The sample of each token of the row."""
    return [n for n, (a, b) in enumerate(itertools.pairwise(cut.borders)) for _ in range(a, b)]


@given(cuts())
def test_every_token_is_held_once_and_all_come_together_again(cut):
    row = torch.arange(cut.borders[-1])[None]
    parts = [cut.take(row, rank) for rank in range(cut.ranks)]
    assert [part.shape[1] for part in parts] == [cut.length(rank) for rank in range(cut.ranks)]
    assert torch.equal(cut.join(parts), row)
    assert max(map(len, (p[0] for p in parts))) - min(map(len, (p[0] for p in parts))) <= (2 if cut.balanced else 1)
    for number in range(len(cut.segments)):
        assert number in cut.held(cut.holder(number))


@given(cuts())
def test_positions_and_borders_of_a_rank(cut):
    samples = samples_of(cut)
    for rank in range(cut.ranks):
        mine = cut.take(torch.arange(cut.borders[-1])[None], rank)[0].tolist()
        assert cut.positions(rank).tolist() == [token - cut.borders[samples[token]] for token in mine]
        changes = [
            place
            for place in range(1, len(mine))
            if mine[place] != mine[place - 1] + 1
            or samples[mine[place]] != samples[mine[place - 1]]
            or mine[place] in [cut.segments[number].start for number in cut.held(rank)]
        ]
        assert cut.local_borders(rank) == ([0, *changes, len(mine)] if mine else [0])


@given(cuts())
def test_heads_tails_and_distances(cut):
    samples = samples_of(cut)
    for number, (start, end) in enumerate(cut.segments):
        tokens = range(start, end)
        head = [t for t in tokens if start > 0 and samples[t] == samples[start - 1]]
        tail = [t for t in tokens if end < len(samples) and samples[t] == samples[end]]
        for part, expected in ((cut.head(number), head), (cut.tail(number), tail)):
            assert (list(range(*part)) if part else []) == expected
        (distances,) = cut.distances(later=[number])
        for earlier, other in enumerate(cut.segments):
            linked = earlier < number and other.start < other.end and start < end
            linked = linked and samples[other.end - 1] == samples[start]
            assert distances[earlier] == (start - other.end if linked else -1)


def test_a_part_is_found_among_what_a_rank_holds():
    cut = Cut((0, 3, 16), 2, balanced=True)
    assert [cut.held(0), cut.held(1)] == [[0, 3], [1, 2]]
    assert cut.place(0, cut.tail(0)) == slice(3, 4)
    assert cut.place(0, cut.head(3)) == slice(4, 8)
    with pytest.raises(ValueError, match="does not hold"):
        cut.place(1, cut.tail(0))


def test_what_is_no_cut_is_refused():
    for borders in ((0,), (1, 4), (0, 4, 4), (0, 5, 3)):
        with pytest.raises(UserError, match="rise strictly"):
            Cut(borders, 2)
    with pytest.raises(UserError, match="at least 1 rank"):
        Cut((0, 4), 0)
