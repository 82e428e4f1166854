"""The rules of the house: who may import whom, one style, short files and functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "src").rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 60


def run(*command):
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_arrow_points_down():
    out = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert "0 broken" in out


@pytest.mark.parametrize(
    "arguments", [("check", "--no-cache"), ("format", "--check", "--no-cache")], ids=("check", "format")
)
def test_one_style(arguments):
    run(sys.executable, "-m", "ruff", *arguments, "src", "tests", "bench")


def test_files_are_short():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    assert len(lengths) > 30
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_functions_are_short():
    long = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    long[f"{path.relative_to(ROOT).as_posix()}: {node.name}"] = length
    assert long == {}


def test_tests_mirror_the_package():
    """A room's tests lie in the folder of its name."""
    rooms = {path.name for path in (ROOT / "src" / "fulmen").iterdir() if (path / "__init__.py").exists()}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and list(path.glob("test_*.py"))}
    assert folders <= rooms
