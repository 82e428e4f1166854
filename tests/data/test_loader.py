"""The loader: epochs, shuffling, the ramp of batch sizes, exact resuming; and the held-out pass."""

import json
import multiprocessing
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fulmen.config import UserError
from fulmen.data.chat import encode_chat
from fulmen.data.documents import Document
from fulmen.data.encoding import encode_document
from fulmen.data.images import ImageProcessor
from fulmen.data.loader import PackedLoader, corpus_fingerprint, held_out_batches
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
    assert encode_document(tokenizer, Document("x = 1", "a")).ids.tolist() == expected


def test_a_conversation_has_special_marks_from_the_first_bos_to_the_last_eos(tokenizer):
    ids = encode_document(tokenizer, DOCUMENTS[-1]).ids.tolist()
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
    expected = sorted(encode_document(tokenizer, document).ids.tolist() for document in documents)
    assert sorted(found[: len(texts)]) == expected
    assert sorted(found[len(texts) :]) == expected


def test_rows_have_exactly_the_size_asked_for(tokenizer):
    loader = loader_of(tokenizer)
    assert [loader.next_batch(size).tokens.shape for size in (None, 5, 100)] == [(1, 32), (1, 5), (1, 100)]
    assert (loader.next_batch().cu_seqlens.diff() <= 16).all()


def test_epochs_end_or_go_on_for_ever(tokenizer):
    one_epoch = sum(len(encode_document(tokenizer, document)) for document in DOCUMENTS)
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
        assert len(loader._open) <= 3


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
    assert predicted == sorted(
        i for document in DOCUMENTS for i in encode_document(tokenizer, document).ids[1:].tolist()
    )
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


PROCESSOR = ImageProcessor(crop_size=28, patch_size=14)


def picture(number):
    return Image.new("RGB", (20 + 9 * number, 30), (10 * number, 0, 0))


def shown(number):
    parts = [{"type": "image", "image": lambda: picture(number)}, {"type": "text", "text": "Which?"}]
    return Document(f"<image>{number}", f"pictures#{number}", ({"role": "user", "content": parts}, *CHAT[1:]))


PICTURES = [*map(shown, range(6)), *DOCUMENTS[:6]]


def described(batches):
    """All of a batch that can be compared."""
    return [
        (
            *(tensor.tolist() for tensor in (batch.tokens, batch.targets, batch.cu_seqlens)),
            [(placed.image.digest, placed.start, placed.first, placed.count) for placed in batch.images],
        )
        for batch in batches
    ]


def test_processes_that_read_ahead_change_nothing(tokenizer):
    changes = {"documents": PICTURES, "images": PROCESSOR, "texts": [DOCUMENTS[10:]], "text_every": 3, "epochs": 2}
    here, there = (loader_of(tokenizer, workers=workers, **changes) for workers in (0, 2))
    batches = rest_of(here)
    assert described(rest_of(there)) == described(batches)
    first = loader_of(tokenizer, **changes)
    for _ in range(3):
        first.next_batch()
    resumed = loader_of(tokenizer, workers=1, **changes)
    resumed.next_batch()
    resumed.load_state_dict(first.state_dict())
    assert described(rest_of(resumed)) == described(batches[3:])


def test_processes_that_read_ahead_end_with_their_loader(tokenizer):
    """At once, because nothing goes round: what the garbage collector finds later ends one process in five seconds."""
    before = len(multiprocessing.active_children())
    loader = loader_of(tokenizer, workers=2, documents=PICTURES, images=PROCESSOR)
    loader.next_batch()
    assert len(multiprocessing.active_children()) == before + 2
    del loader
    assert len(multiprocessing.active_children()) == before


@pytest.mark.parametrize("interleave", [1, 5])
def test_resuming_with_images_and_texts_gives_the_same_batches(tokenizer, interleave):
    changes = {"images": PROCESSOR, "counted": "answers", "texts": [DOCUMENTS[10:]], "text_every": 3}
    changes |= {"documents": PICTURES, "epochs": 2, "interleave": interleave, "sequence_length": 23}
    loader = loader_of(tokenizer, **changes)
    states, batches = [json.dumps(loader.state_dict())], []
    while (batch := loader.next_batch(31)) is not None:
        batches.append(batch)
        states.append(json.dumps(loader.state_dict()))
    assert any(placed.first for batch in batches for placed in batch.images)
    for turn, state in enumerate(states[:-1]):
        resumed = loader_of(tokenizer, **changes)
        resumed.load_state_dict(json.loads(state))
        assert described(rest_of(resumed, [31])) == described(batches[turn:])


def test_images_are_read_when_their_turn_comes(tokenizer):
    read = []
    parts = lambda number: [{"type": "image", "image": lambda: read.append(number) or picture(number)}]  # noqa: E731
    documents = [Document("", f"{n}", ({"role": "user", "content": parts(n)},)) for n in range(50)]
    loader = loader_of(tokenizer, documents=documents, images=PROCESSOR, interleave=2)
    assert read == []
    loader.next_batch(8)
    assert 0 < len(read) <= 2


def test_an_image_without_a_processor_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"^pictures#\d: it has an image, and the model sees none"):
        rest_of(loader_of(tokenizer, documents=PICTURES, epochs=1))


def test_a_text_is_one_sample_and_another_one_the_next_time(tokenizer):
    text = Document(" ".join(map(str, range(100))), "long")
    whole = encode_document(tokenizer, text).ids
    loader = loader_of(tokenizer, documents=DOCUMENTS[:1], texts=[[text]], text_every=1, epochs=60, interleave=1)
    (batch,) = rest_of(loader, [10**6])
    borders = batch.cu_seqlens.tolist()
    samples = [(batch.tokens[0, a:b], batch.targets[0, a:b]) for a, b in pairwise(borders)][::2]
    assert len(samples) == 60
    starts = range(0, len(whole) - 1, 16)
    for turn, (tokens, targets) in enumerate(samples):
        start = starts[turn % len(starts)]
        assert torch.equal(tokens, whole[start : start + len(tokens)])
        assert torch.equal(targets, whole[start + 1 : start + 1 + len(tokens)])


def test_a_state_of_other_settings_is_refused_and_an_old_one_of_text_is_not(tokenizer):
    state = loader_of(tokenizer).state_dict()
    assert state["identity"].keys() == {"documents", "corpus", "tokenizer", "seed", "sequence_length", "interleave"}
    changes = {"images": PROCESSOR, "counted": "answers", "texts": [DOCUMENTS[:2]], "text_every": 5}
    for key, other in (
        ("images", ImageProcessor(crop_size=28, patch_size=14, dynamic=False)),
        ("counted", "all"),
        ("texts", [DOCUMENTS[:3]]),
        ("text_every", 6),
    ):
        with pytest.raises(UserError, match=f"the data is not that of the snapshot: {key} was"):
            loader_of(tokenizer, **changes | {key: other}).load_state_dict(loader_of(tokenizer, **changes).state_dict())
    with pytest.raises(UserError, match="images was None and is"):
        loader_of(tokenizer, **changes).load_state_dict(state)
    with pytest.raises(UserError, match="text_every = 0 is too small"):
        loader_of(tokenizer, text_every=0)


def test_the_held_out_pass_has_images_and_counts_answers(tokenizer):
    batches = held_out_batches(
        PICTURES, tokenizer, batch_tokens=50, sequence_length=30, max_tokens=10**6, images=PROCESSOR, counted="answers"
    )
    assert {placed.image.digest for batch in batches for placed in batch.images} == {
        PROCESSOR.process(picture(number)).digest for number in range(6)
    }
    for batch in batches:
        places = [p for placed in batch.images for p in range(placed.start, placed.start + placed.count)]
        assert (batch.tokens[0] == tokenizer.image_id).nonzero().flatten().tolist() == places
    counted = sum((batch.targets >= 0).sum().item() for batch in batches)
    answer = len(tokenizer.encode("def add")) + 1
    assert counted == 6 * answer + sum(len(encode_document(tokenizer, document)) for document in DOCUMENTS[:6])
