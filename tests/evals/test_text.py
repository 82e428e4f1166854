"""Bits per byte are those of a direct computation."""

import math

import pytest
import torch

from fulmen.checkpoint import load_model, make_tiny
from fulmen.config import UserError
from fulmen.data import Document, Tokenizer, held_out_batches
from fulmen.evals.text import bits_per_byte, text_table


@pytest.mark.parametrize("vision", [False, True])
@torch.no_grad()
def test_bits_per_byte(tmp_path, vision):
    make_tiny(tmp_path / "tiny", vision=vision)
    model, tokenizer = load_model(tmp_path / "tiny"), Tokenizer.load(tmp_path / "tiny")
    text = "Attention lets every token look at every token before it."
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    logs = model(ids[None, :-1])[0].log_softmax(dim=-1)
    expected = -logs.gather(1, ids[1:, None]).sum().item() / math.log(2) / len(text)
    shape = {"batch_tokens": 100, "sequence_length": 100, "max_tokens": 100}
    batches = held_out_batches([Document(text, "one")], tokenizer, **shape)
    found = bits_per_byte(model, batches, tokenizer.byte_lengths())
    assert found == pytest.approx(expected, rel=1e-4)


def test_nothing_held_out_is_refused(tmp_path):
    make_tiny(tmp_path / "tiny")
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("some text")
    with pytest.raises(UserError, match="nothing is held out: give a share above 0"):
        text_table(tmp_path / "tiny", [str(tmp_path / "*.txt")], held_out=0, max_tokens=100, device="cpu")


def test_a_file_of_ones_own(tmp_path):
    make_tiny(tmp_path / "tiny")
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("some text of one's own " * 20)
    (row,) = text_table(tmp_path / "tiny", [str(tmp_path / "*.txt")], held_out=0.5, max_tokens=100, device="cpu")
    assert row["bits per byte"] > 1
