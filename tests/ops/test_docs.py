"""docs/numerics.md: every test that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_statement_names_a_test_that_exists():
    named = re.findall(r"(tests/\S+\.py)::(\w+)", (ROOT / "docs" / "numerics.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
