"""docs/model.md: its example runs, its table of sizes is that of the code."""

import re
from pathlib import Path

import torch

from fulmen.model import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "model.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_runs():
    names = {}
    exec(EXAMPLES[0], names)
    assert names["logits"].shape == (2, 21, 512)
    torch.testing.assert_close(torch.cat(names["pieces"], dim=1), names["logits"], rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_the_example_of_a_pool_runs():
    names = {}
    exec(EXAMPLES[1], names)
    assert names["logits"].shape == (1, 2, 4096)
    assert names["logits"].isfinite().all()
    assert len(EXAMPLES) == 2


def test_sizes():
    def short(number):
        return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"

    rows = re.findall(r"^\| (\S+) \| ([\d.]+ [MB]) \| ([\d.]+ [MB]) \| (\d+) \|$", PAGE, re.MULTILINE)
    counts = {name: (config.count_parameters(), config.num_layers) for name, config in PRESETS.items()}
    assert rows == [(name, short(c.total), short(c.active), str(layers)) for name, (c, layers) in counts.items()]
