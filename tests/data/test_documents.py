"""Corpora: one numbering over several shelves, selections, origins."""

import numpy as np
import pytest

from fulmen.data.documents import Corpus, Document, Texts, as_corpus, file_of, spread

DOCUMENTS = [Document(f"text {number}", f"file{number}") for number in range(5)]


def test_a_corpus_numbers_its_shelves_on():
    corpus = Corpus([Texts(DOCUMENTS[:2]), Texts([]), Texts(DOCUMENTS[2:])])
    assert len(corpus) == 5
    assert list(corpus) == DOCUMENTS
    assert [corpus.origin(index) for index in range(5)] == [document.origin for document in DOCUMENTS]
    with pytest.raises(IndexError):
        corpus[5]


def test_a_selection_of_a_selection():
    corpus = Corpus([Texts(DOCUMENTS[:2]), Texts(DOCUMENTS[2:])])
    chosen = corpus.select(np.array([4, 0, 3])).select(np.array([2, 0]))
    assert list(chosen) == [DOCUMENTS[3], DOCUMENTS[4]]


def test_as_corpus_keeps_a_corpus_and_wraps_a_list():
    corpus = as_corpus(DOCUMENTS)
    assert list(corpus) == DOCUMENTS
    assert as_corpus(corpus) is corpus


@pytest.mark.parametrize(
    ("origin", "file"), [("a/b.py", "a/b.py"), ("a.jsonl#12", "a.jsonl"), ("c#.txt", "c#.txt"), ("#3", "")]
)
def test_file_of_leaves_the_row_out(origin, file):
    assert file_of(origin) == file


@pytest.mark.parametrize("count", [0, 1, 2, 97, 1000])
def test_spread_is_a_permutation_whose_beginnings_are_even(count):
    order = spread(count)
    assert sorted(order) == list(range(count))
    for length in (8, 50):
        if count > 4 * length:
            gaps = np.diff(np.sort(order[:length]))
            assert gaps.max() <= 4 * count / length
