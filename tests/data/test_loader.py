"""The loader: epochs, shuffling, the ramp of batch sizes, exact resuming; and the held-out pass."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulmen.config import UserError
from fulmen.data.chat import encode_chat
from fulmen.data.documents import Document
from fulmen.data.loader import PackedLoader, corpus_fingerprint, encode_document, held_out_batches
from fulmen.data.tokenizer import BOS, EOS, Tokenizer

CHAT = ({"role": "user", "content": f"add{EOS}"}, {"role": "assistant", "content": "def add"})
DOCUMENTS = [Document("def f(x): return x\n" * (number % 5) + f"{number}", f"{number}.py") for number in range(23)]
DOCUMENTS.append(Document("rendered", "chat#1", CHAT))
SIZES = [7, 64, 20]


def loader_of(tokenizer, documents=DOCUMENTS, **changes):
    settings = {"batch_tokens": 32, "sequence_length": 16, "seed": 3} | changes
    return PackedLoader(documents, tokenizer, **settings)


def rest_of(loader, sizes=(None,)):
    batches, turn = [], 0
    while (batch := loader.next_batch(sizes[turn % len(sizes)])) is not None:
        batches.append(batch)
        turn += 1
    return batches


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.cu_seqlens, b.cu_seqlens)
        for a, b in zip(first, second, strict=True)
    )


def documents_in(batches, tokenizer):
    """The ids of the documents of a stream without interleaving, put together again."""
    found = []
    for batch in batches:
        for token, target in zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True):
            if not found or (found[-1][-1] == tokenizer.eos_id and token == tokenizer.bos_id):
                found.append([token])
            assert found[-1][-1] == token
            found[-1].append(target)
    return found


def test_a_document_is_bos_text_eos(tokenizer):
    expected = [tokenizer.bos_id, *tokenizer.encode("x = 1"), tokenizer.eos_id]
    assert encode_document(tokenizer, Document("x = 1", "a")) == expected


def test_a_conversation_has_special_marks_from_the_first_bos_to_the_last_eos(tokenizer):
    ids = encode_document(tokenizer, DOCUMENTS[-1])
    assert ids == encode_chat(tokenizer, CHAT, generate=False)[: len(ids)]
    assert (ids[0], ids[-1], ids.count(tokenizer.eos_id)) == (tokenizer.bos_id, tokenizer.eos_id, 2)


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 20), st.integers(0, 9))
def test_each_document_exactly_once_per_epoch(tokenizer, texts, sizes, sequence_length, seed):
    documents = [Document(text, str(number)) for number, text in enumerate(texts)]
    loader = PackedLoader(
        documents, tokenizer, batch_tokens=1, sequence_length=sequence_length, seed=seed, epochs=2, interleave=1
    )
    found = documents_in(rest_of(loader, sizes), tokenizer)
    expected = sorted(encode_document(tokenizer, document) for document in documents)
    assert sorted(found[: len(texts)]) == expected
    assert sorted(found[len(texts) :]) == expected


def test_rows_have_exactly_the_size_asked_for(tokenizer):
    loader = loader_of(tokenizer)
    assert [loader.next_batch(size).tokens.shape for size in (None, 5, 100)] == [(1, 32), (1, 5), (1, 100)]
    assert (loader.next_batch().cu_seqlens.diff() <= 16).all()


def test_epochs_end_or_go_on_for_ever(tokenizer):
    one_epoch = sum(len(encode_document(tokenizer, document)) - 1 for document in DOCUMENTS)
    for epochs in (1, 3):
        loader = loader_of(tokenizer, epochs=epochs)
        batches = rest_of(loader)
        assert sum(batch.tokens.numel() for batch in batches) == epochs * one_epoch
        assert loader.epoch == epochs - 1
        assert loader.next_batch() is None
    endless = loader_of(tokenizer)
    assert endless.epoch == 0
    assert endless.next_batch(5 * one_epoch + 1).tokens.shape == (1, 5 * one_epoch + 1)
    assert endless.epoch == 5


def test_the_order_depends_on_seed_and_epoch_alone(tokenizer):
    def order(epoch, seed):
        loader = loader_of(tokenizer, seed=seed, interleave=1, epochs=epoch + 1)
        return documents_in(rest_of(loader), tokenizer)[epoch * len(DOCUMENTS) :]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    assert sorted(order(0, 3)) == sorted(order(1, 4))


@pytest.mark.parametrize("interleave", [1, 4, 100])
def test_resuming_at_any_step_gives_the_same_batches(tokenizer, interleave):
    loader = loader_of(tokenizer, epochs=2, interleave=interleave)
    states, batches = [], []
    for turn in range(1000):
        states.append(json.dumps(loader.state_dict()))
        batch = loader.next_batch(SIZES[turn % 3])
        if batch is None:
            break
        batches.append(batch)
    assert len(states) > 20
    for turn, state in enumerate(states):
        resumed = loader_of(tokenizer, epochs=2, interleave=interleave)
        resumed.load_state_dict(json.loads(state))
        sizes = [SIZES[(turn + place) % 3] for place in range(3)]
        assert same(rest_of(resumed, sizes), batches[turn:])


def test_only_documents_being_read_are_kept(tokenizer):
    loader = loader_of(tokenizer, interleave=3)
    for _ in range(50):
        loader.next_batch()
        assert len(loader._open_ids) <= 3


def test_loading_a_state_goes_back_within_one_loader_too(tokenizer):
    loader = loader_of(tokenizer, epochs=1)
    loader.next_batch()
    state = loader.state_dict()
    expected = rest_of(loader)
    loader.load_state_dict(state)
    assert same(rest_of(loader), expected)


def test_resuming_in_another_process(tokenizer, tmp_path):
    loader = loader_of(tokenizer)
    loader.next_batch()
    tokenizer.save(tmp_path)
    script = f"""
import json, sys
from fulmen.data import Document, PackedLoader, Tokenizer
documents = [Document(*fields) for fields in json.load(sys.stdin)]
loader = PackedLoader(documents, Tokenizer.load({str(tmp_path)!r}), batch_tokens=32, sequence_length=16, seed=3)
loader.load_state_dict({loader.state_dict()!r})
print(json.dumps([loader.next_batch().tokens.tolist() for _ in range(5)]))
"""
    given_documents = json.dumps([(d.text, d.origin, d.messages) for d in DOCUMENTS])
    command = [sys.executable, "-c", script]
    answer = subprocess.run(command, input=given_documents, capture_output=True, text=True, check=True).stdout
    assert json.loads(answer) == [loader.next_batch().tokens.tolist() for _ in range(5)]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"documents": DOCUMENTS[1:]}, "documents"),
        ({"documents": [*DOCUMENTS[:-1], Document("other", "chat#1")]}, "corpus"),
        ({"documents": [*DOCUMENTS[:-1], Document("rendered", "moved")]}, "corpus"),
        ({"sequence_length": 17}, "sequence_length"),
        ({"seed": 4}, "seed"),
        ({"interleave": 3}, "interleave"),
    ],
)
def test_a_state_of_other_data_is_refused(tokenizer, changes, key):
    state = loader_of(tokenizer).state_dict()
    with pytest.raises(UserError, match=rf"the data is not that of the snapshot: {key} was .* and is "):
        loader_of(tokenizer, **changes).load_state_dict(state)


def test_a_state_of_another_tokenizer_is_refused(tokenizer):
    other = Tokenizer.train(["something else, something new"], 265)
    with pytest.raises(UserError, match=r"tokenizer was .* and is "):
        loader_of(other).load_state_dict(loader_of(tokenizer).state_dict())


@pytest.mark.parametrize("state", [{}, {"epoch": 0, "following": 1, "open": [3], "identity": {}}, None])
def test_what_is_no_state_is_refused(tokenizer, state):
    with pytest.raises(UserError, match="this is not the state of a data loader"):
        loader_of(tokenizer).load_state_dict(state)


@pytest.mark.parametrize("name", ["batch_tokens", "sequence_length", "epochs", "interleave"])
def test_sizes_below_one(tokenizer, name):
    with pytest.raises(UserError, match=f"{name} = 0 is too small"):
        loader_of(tokenizer, **{name: 0})


def test_other_impossible_arguments(tokenizer):
    with pytest.raises(UserError, match="batch_tokens = -1 is too small"):
        loader_of(tokenizer).next_batch(-1)
    with pytest.raises(UserError, match="seed = -1 is negative"):
        loader_of(tokenizer, seed=-1)
    with pytest.raises(UserError, match="no documents to make batches of"):
        loader_of(tokenizer, documents=[])


def test_a_tokenizer_that_cannot_mark_documents(tokenizer):
    backend = type(tokenizer._parsing).from_str(tokenizer._parsing.to_str().replace(EOS, "<|end|>"))
    with pytest.raises(UserError, match=r"the tokenizer lacks .*, which mark documents"):
        loader_of(Tokenizer(backend))
    with pytest.raises(UserError, match=r"the tokenizer lacks .*, which mark documents"):
        held_out_batches(DOCUMENTS, Tokenizer(backend), batch_tokens=8, sequence_length=8, max_tokens=8)


def test_a_large_corpus_is_fingerprinted_by_some_of_its_documents():
    class Counting(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    corpus = Counting(Document(f"{number}", f"{number}") for number in range(10_000))
    assert corpus_fingerprint(corpus) == corpus_fingerprint(corpus)
    assert corpus.read <= 2 * 4096
    assert corpus_fingerprint(corpus[1:]) != corpus_fingerprint(corpus)


def test_the_held_out_pass_takes_everything_if_there_is_room(tokenizer):
    batches = held_out_batches(DOCUMENTS, tokenizer, batch_tokens=50, sequence_length=16, max_tokens=10**6)
    assert all(batch.tokens.shape == (1, 50) for batch in batches[:-1])
    predicted = torch.cat([batch.targets[0] for batch in batches]).sort().values.tolist()
    assert predicted == sorted(i for document in DOCUMENTS for i in encode_document(tokenizer, document)[1:])
    assert all((batch.cu_seqlens.diff() <= 16).all() for batch in batches)


def test_the_held_out_pass_is_spread_over_documents_and_within_them(tokenizer):
    ids = {number: tokenizer.encode(chr(number))[0] for number in range(97, 117)}
    assert len(set(ids.values())) == 20
    documents = [Document(chr(number) * 500 + "\n" * 500, chr(number)) for number in ids]
    layout = {"batch_tokens": 64, "sequence_length": 16, "max_tokens": 320}
    batches = held_out_batches(documents, tokenizer, **layout)
    assert sum(batch.tokens.numel() for batch in batches) == 320
    seen = torch.cat([batch.tokens[0] for batch in batches]).tolist()
    # Twenty documents, one piece of 16 tokens each: about half lie in the first half of their documents.
    assert 5 <= len(set(ids.values()) & set(seen)) <= 15
    assert same(batches, held_out_batches(documents, tokenizer, **layout))


def test_a_short_held_out_pass_does_not_keep_to_the_first_documents(tokenizer):
    documents = [Document(f"{number:03d}", f"{number}") for number in range(200)]
    batches = held_out_batches(documents, tokenizer, batch_tokens=64, sequence_length=16, max_tokens=64)
    text = tokenizer.decode(batches[0].tokens[0].tolist(), skip_special=False)
    numbers = [int(number) for number in text.split(BOS)[1:-1]]
    assert min(numbers) < 50
    assert max(numbers) > 150


@pytest.mark.parametrize("max_tokens", [1, 15, 16, 17, 200])
def test_the_held_out_pass_takes_exactly_what_is_allowed(tokenizer, max_tokens):
    batches = held_out_batches(DOCUMENTS, tokenizer, batch_tokens=50, sequence_length=16, max_tokens=max_tokens)
    assert sum(batch.tokens.numel() for batch in batches) == max_tokens


@pytest.mark.parametrize("name", ["batch_tokens", "sequence_length", "max_tokens"])
def test_held_out_sizes_below_one(tokenizer, name):
    sizes = {"batch_tokens": 8, "sequence_length": 8, "max_tokens": 8} | {name: 0}
    with pytest.raises(UserError, match=f"{name} = 0 is too small"):
        held_out_batches(DOCUMENTS, tokenizer, **sizes)
    with pytest.raises(UserError, match="no documents"):
        held_out_batches([], tokenizer, batch_tokens=8, sequence_length=8, max_tokens=8)
