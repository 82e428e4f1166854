"""The tables of README and docs are what bench/results says."""

import importlib
import sys
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:
    # As where its script lies, which imports from beside itself.
    patch.setattr(sys, "path", [str(Path(__file__).parents[2] / "bench"), *sys.path])
    pages = importlib.import_module("pages")


@pytest.mark.parametrize("path", pages.PAGES, ids=lambda path: path.name)
def test_pages_are_what_the_results_say(path):
    text = path.read_text(encoding="utf-8")
    assert len(pages.SECTION.findall(text)) >= 3
    assert pages.page(text) == text


def test_a_number_changed_by_hand_is_seen():
    text = pages.PAGES[0].read_text(encoding="utf-8")
    assert pages.page(text.replace("| 1 x 8192 | 0.22", "| 1 x 8192 | 0.12")) == text
