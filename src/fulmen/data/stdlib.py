"""The embedded corpus: the running Python's own standard library, as source text and as dialogues made out of it."""

import ast
import os
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

from fulmen.config import UserError
from fulmen.data.chat import render_chat
from fulmen.data.documents import Document

# Installed packages are not the library; tests, the two programs and the bundled wheels are not its style.
SKIPPED_FOLDERS = frozenset(
    (
        *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"),
        *("turtledemo", "encodings", "pydoc_data"),  # the last two are tables, a fifth of all text
    )
)
# Records of how this Python was built: they hold paths of the machine and differ between machines.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

REQUEST_CHARACTERS = (16, 300)
ANSWER_CHARACTERS = (40, 1200)


def source_documents() -> list[Document]:
    """Every file of the standard library with text in it, in the order of the names."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [Document(text, origin) for origin, text in _files(root) if text.strip()]
    if not documents:
        raise UserError(f"this Python keeps no library source in {root}: name files of your own as data.sources")
    return sorted(documents, key=lambda document: document.origin)


def dialogue_documents() -> list[Document]:
    """A dialogue for each documented function of the library: its docstring's first paragraph asks for its source."""
    return [dialogue for document in source_documents() for dialogue in dialogues_in(document)]


def dialogues_in(document: Document) -> list[Document]:
    """The dialogues that one file of Python source gives; their origins are the file's own with `#1`, `#2`, ..."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return []
    lines = document.text.split("\n")
    pairs = filter(None, (_request_and_answer(function, lines) for function in _functions(tree)))
    return [
        _dialogue(request, answer, f"{document.origin}#{number}") for number, (request, answer) in enumerate(pairs, 1)
    ]


def _files(root: Path) -> Iterator[tuple[str, str]]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not _is_build_record(name)]
        for name in names:
            path = Path(folder, name)
            if not name.endswith(".py") or _is_build_record(name):
                continue
            try:
                with tokenize.open(path) as file:
                    yield path.relative_to(root).as_posix(), file.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                # A file that Python itself could not read is not part of the corpus.
                continue


def _is_build_record(name: str) -> bool:
    return name.startswith(SKIPPED_PREFIXES)


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in tree.body:
        for member in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                yield member


def _request_and_answer(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    docstring = ast.get_docstring(function)
    # Without a statement after the docstring nothing is left to answer with.
    if not docstring or len(function.body) < 2:
        return None
    request = _first_paragraph(docstring)
    answer = _source_without_docstring(function, lines)
    fits = REQUEST_CHARACTERS[0] <= len(request) <= REQUEST_CHARACTERS[1]
    return (request, answer) if fits and answer is not None else None


def _first_paragraph(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    if len(paragraph) <= REQUEST_CHARACTERS[1]:
        return paragraph
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


def _source_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    docstring, following = function.body[0], function.body[1]
    shares_a_line = following.lineno == docstring.end_lineno
    if shares_a_line:
        return None
    kept = lines[first - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : function.end_lineno]
    source = textwrap.dedent("\n".join(kept))
    fits = ANSWER_CHARACTERS[0] <= len(source) <= ANSWER_CHARACTERS[1]
    # A string that reaches the left margin keeps the function from being dedented.
    return source if fits and not source[0].isspace() else None


def _dialogue(request: str, answer: str, origin: str) -> Document:
    messages = ({"role": "user", "content": request}, {"role": "assistant", "content": answer})
    return Document(render_chat(messages, generate=False), origin, messages)
