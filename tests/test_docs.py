"""What the pages tell a reader to type works, and their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from fulmen.cli import _parser
from fulmen.cli.tasks import load_task
from fulmen.config import find_recipe, load_recipe
from fulmen.marl.recipe import MarlRecipe

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))) if page.exists()
]
PAGES += sorted(ROOT.glob("src/**/README.md"))
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What ends a command within a line.
ENDS = ("|", "||", "&&", "&", ";", ">", ">>", "<", "2>")


def commands(text):
    """The lines of a page's shell blocks, as words, from the program's name to the end of the command."""
    for language, block in BLOCK.findall(text):
        if language in ("sh", "bash", "shell", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                yield words[: next((at for at, word in enumerate(words) if word in ENDS), len(words))]


def cases(program):
    found = []
    for page in PAGES:
        for words in commands(page.read_text(encoding="utf-8")):
            if words and Path(words[0]).name == program:
                found.append(pytest.param(words[1:], id=f"{page.relative_to(ROOT)}: {shlex.join(words)}"))
    return found


def test_commands_are_found():
    shell = "$ fulmen info tiny | head -1  # sizes\n.venv/bin/fulmen train a \\\n  --resume\n"
    page = f"```sh\n{shell}```\n```\nfulmen no\n```\n"
    assert list(commands(page)) == [["fulmen", "info", "tiny"], [".venv/bin/fulmen", "train", "a", "--resume"]]
    assert len(cases("fulmen")) > 3


@pytest.mark.parametrize("words", cases("fulmen"))
def test_command_is_accepted(words):
    if "--help" in words:
        words = [word for word in words if word != "--help"] or ["info", "tiny"]
    arguments = _parser().parse_args(words)
    recipe = "quickstart" if words[0] == "quickstart" else getattr(arguments, "recipe", None)
    # Files such as mine.toml are the reader's own.
    if recipe is not None and (not recipe.endswith(".toml") or recipe.startswith("recipes/")):
        path = ROOT / recipe if recipe.startswith("recipes/") else find_recipe(recipe)
        if words[0] == "marl":
            load_recipe(path, MarlRecipe, arguments.set)
        else:
            load_task(path, arguments.set)


@pytest.mark.parametrize("words", cases("make"))
def test_target_exists(words):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert file.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
        if anchor:
            assert anchor in slugs(file.read_text(encoding="utf-8")), f"{page.name} links to {target}"


def slugs(text):
    """The anchors that headings get."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_slugs():
    assert slugs("# A `b`, c\n## D-e\n```\n# not\n```\n") == {"a-b-c", "d-e"}
