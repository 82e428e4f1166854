"""Tiny random checkpoints with a tokenizer, for the tests of whoever loads this architecture."""

from pathlib import Path

import torch

from fulmen.checkpoint.writer import save_model
from fulmen.data import Tokenizer
from fulmen.model import LanguageModel, ModelConfig, VisionConfig, VisionLanguageConfig, VisionLanguageModel
from fulmen.model.norm import RMSNorm

VOCAB_SIZE = 512

# Enough words for the merges of the vocabulary; a fixed text, so that the same tokenizer comes out everywhere.
TEXT = """\
Attention lets every token look at every token before it. With softmax the cost of a sequence grows with the square of
its length, because each new token is compared with all earlier ones and their keys and values have to be kept. Linear
attention leaves the softmax away. The products can then be taken in another order: the keys and values of the past are
summed into one matrix, the state, and each query reads its answer from that matrix. The state is as large after a
million tokens as it is after one, and a new token costs the same wherever it stands. Lightning attention is a linear
attention with decay. Before a token adds its key and value, the state is made a little smaller, so that old tokens fade
and new ones stand out. Each head has its own rate: some heads forget within a few tokens, some remember thousands. To
keep matrix units busy the sequence is cut into blocks; inside a block the products are taken as in softmax attention,
and between blocks the state is handed on. A model of linear layers alone is weak at finding a needle in a haystack, so
every eighth layer here is one of softmax attention, with few heads for keys and values and with rotary positions on a
part of each head. Between the attention layers stand mixtures of experts. A router scores all experts for each token,
the best two are asked, and their answers are added with the weights that the router gave them. The other experts rest,
which is why a model of many parameters can be cheap to run. Numbers such as 0, 1, 2, 3, 10, 42, 128, 256, 1024 and 2048
occur, and so do quotes, "like these", brackets (or parentheses), and code:
    def state(keys, values, rate):
        total = 0.0
        for key, value in zip(keys, values):
            total = total * decay(rate) + outer(key, value)
        return total
"""


def make_tiny(path: str | Path, dialect: str = "original", *, vision: bool = False, seed: int = 0) -> None:
    """Write a random checkpoint of about 2 MB with a tokenizer of 512 entries into the folder `path`.

    8 layers LLLLLLLS, 4 heads of 64 dims (a size that fused attention kernels accept), 2 of them for keys and values, 4
    experts, bf16. In the original dialect half of each head is rotated, as released; in that of transformers all of it.
    With `vision` it is a vision-language model whose encoder sees crops of 56 pixels in 2 layers; 16 positions a crop.
    The norms' weights are random too, so that a swapped one shows. The same seed gives the same file with the same
    version of PyTorch. Raises UserError as `save_model` does.
    """
    head_dim = 64
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        rotary_dim=head_dim if dialect == "transformers" else head_dim // 2,
        num_experts=4,
        expert_size=32,
        max_positions=8192,
    )
    tokenizer = Tokenizer.train([TEXT], VOCAB_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _with_vision(config, tokenizer.image_id) if vision else LanguageModel(config)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    save_model(model.bfloat16(), path, dialect, tokenizer=tokenizer)


def _with_vision(text: ModelConfig, image_token: int) -> VisionLanguageModel:
    vision = VisionConfig(image_size=56, hidden_size=48, num_layers=2, num_heads=4, mlp_size=96)
    return VisionLanguageModel(VisionLanguageConfig(text=text, vision=vision, image_token=image_token))
