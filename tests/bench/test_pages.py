"""The tables of README and docs are what bench/results says."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "bench" / "pages.py"
SPEC = importlib.util.spec_from_file_location("pages", PATH)
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.name)
def test_pages_are_what_the_results_say(path):
    text = path.read_text(encoding="utf-8")
    assert len(tables.SECTION.findall(text)) >= 3
    assert tables.page(text) == text


def test_a_number_changed_by_hand_is_seen():
    text = tables.PAGES[0].read_text(encoding="utf-8")
    assert tables.page(text.replace("| 1 x 8192 | 0.22", "| 1 x 8192 | 0.12")) == text
