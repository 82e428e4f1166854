"""A tokenizer that every test of this room can afford."""

import pytest

from fulmen.data.tokenizer import Tokenizer

TEXTS = [
    "def add(first, second):\n    return first + second\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n",
    "user name=user\nai name=assistant\nsystem ai_setting=assistant\n",
    "Grüße, naïve café: 3.14159 und 1024 🎉 日本語\n",
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)
