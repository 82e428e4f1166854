"""The tables of README and of pages in docs, as bench/results has them.

    python bench/pages.py                 writes the pages anew; nothing is measured
    fulmen bench NAME --json FILE         measures; FILE goes to bench/results

A table stands between `<!-- bench/pages.py NAME -->` and `<!-- end -->`, NAME a function of bench/tables.
"""

import re

from tables import gpu, planning, ranks, serving, vision
from tables.results import ROOT

PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("gpu", "parallel", "serve", "vision")))
SECTION = re.compile(r"(<!-- bench/pages\.py (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {table.__name__: table for subject in (gpu, planning, ranks, serving, vision) for table in subject.TABLES}


def page(text: str) -> str:
    """`text` with every table as the results have it."""
    return SECTION.sub(lambda found: found[1] + TABLES[found[2]]() + "\n" + found[3], text)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
