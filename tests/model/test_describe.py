"""Sizes and memory as text."""

import re

import pytest

from fulmen.model import ModelConfig, describe


def rows_of(text):
    """Values by name; names end where two spaces begin."""
    rows = [re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_the_released_model():
    rows = rows_of(describe(ModelConfig.preset("minimax-text-01"), context=1_000_000, batch=1, dtype="int8"))
    assert rows["layers"] == "80: 70 lightning, 10 softmax"
    assert rows["plan"] == "LLLLLLLS, repeated"
    assert rows["heads"] == "64 of 128 (8 for keys and values of softmax)"
    assert rows["rotary"] == "64 of 128 dims, base 1e+07"
    assert rows["experts"] == "32 of width 9216, 2 a token"
    assert rows["parameters"] == "456.1 B total, 45.9 B active, 2.5 B embedding"
    assert rows["memory for 1 x 1000000 tokens"] == "weights in int8"
    assert rows["weights"] == "458.8 GB"
    assert rows["lightning state"] == "293.6 MB (fp32, whatever the context)"
    # Keys and values stay at two bytes: 40 960 B a token.
    assert rows["keys and values"] == "41.0 GB"
    assert rows["together"] == "500.1 GB and the activations"


@pytest.mark.parametrize(("dtype", "width", "cached"), [("float32", 4, 4), ("bfloat16", 2, 2), ("float16", 2, 2)])
def test_memory_follows_dtype_batch_and_context(dtype, width, cached):
    config = ModelConfig.preset("tiny")
    rows = rows_of(describe(config, context=100, batch=8, dtype=dtype))
    assert rows["weights"] == f"{config.count_parameters().total * width / 1e6:.1f} MB"
    # One softmax layer with 2 heads of 64 for keys and for values.
    assert rows["keys and values"] == f"{8 * 100 * 2 * 2 * 64 * cached / 1e3:.1f} kB"
    # Seven lightning layers with 4 heads of 64 x 64.
    assert rows["lightning state"].startswith(f"{8 * 7 * 4 * 64 * 64 * 4 / 1e6:.1f} MB")


def test_columns_are_aligned_and_lines_end_clean():
    lines = describe(ModelConfig.preset("tiny"), context=10, batch=1, dtype="float32").splitlines()
    assert all(line == line.rstrip() for line in lines)
    starts = {re.match(r".*?\S {2,}(?=\S)", line).end() for line in lines if line}
    assert len(starts) == 1
