"""The table of an encoder: a random one is near chance, and the verb prints it."""

import torch

from fulmen.checkpoint.vision import save_coca
from fulmen.data import Tokenizer
from fulmen.evals.encoder import encoder_table
from fulmen.model.coca import CoCa, CoCaConfig


def test_a_random_encoder_is_near_chance(tmp_path):
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_heads": 2, "mlp_size": 32, "caption_queries": 4}
    vision = {"image_size": 28, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "mlp_size": 32}
    coca = CoCa(CoCaConfig.preset("tiny", vision=vision, **sizes))
    tokenizer = Tokenizer.train(["A picture of the word that is read."], 260)
    save_coca(coca.eval(), tmp_path / "coca", tokenizer)
    (row,) = encoder_table(tmp_path / "coca", ["words"], held_out=0.05, count=30, device="cpu")
    assert row["chance"] == 1 / row["classes"]
    assert row["classes"] > 20
    for key in ("zero-shot top-1", "zero-shot top-1, random encoder"):
        assert row[key] < 0.3
    assert {"image to text recall@5", "text to image recall@5"} <= row.keys()
