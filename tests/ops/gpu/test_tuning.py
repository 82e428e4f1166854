"""An answer is found once and kept, across processes too, and no state of the cache folder stops who asks."""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from fulmen.ops.gpu import tuning

BOOK = "choices-test.json"
SECONDS = {"a": 3.0, "b": 1.0, "c": 2.0}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has taken nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._taken.cache_clear()
    yield tmp_path / "fulmen"
    tuning._taken.cache_clear()


def choose(question="q", seconds=SECONDS, book=BOOK):
    """The answer, and which candidates were timed for it."""
    timed = []

    def time(name):
        timed.append(name)
        return seconds[name]

    candidates = {name: name for name in SECONDS}
    return tuning.choose(question, candidates, seconds and time, book=book), timed


def restart():
    """As a new process would find it."""
    tuning._taken.cache_clear()


def test_the_fastest_is_taken_and_timed_once(cache):
    assert choose() == ("b", ["a", "b", "c"])
    assert choose(seconds={"a": 0.0, "b": 1.0, "c": 1.0}) == ("b", [])
    assert choose("another", {"a": 0.0, "b": 1.0, "c": 1.0})[0] == "a"


def test_candidates_may_be_anything(cache):
    assert tuning.choose("q", {"small": [1], "large": [2]}, lambda x: -x[0], book=BOOK) == [2]


def test_remembered_by_the_next_process(cache):
    code = (
        "from fulmen.ops.gpu import tuning\n"
        f"print(tuning.choose('q', {{'a': 1, 'b': 2}}, {{1: 0.5, 2: 0.25}}.__getitem__, book={BOOK!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2"
    assert json.loads((cache / BOOK).read_text()) == {"q": "b"}
    assert choose(seconds={"a": 0.0, "b": 1.0, "c": 1.0}) == ("b", [])


def test_other_books_know_nothing(cache):
    choose()
    assert choose(book="choices-other.json")[1] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[1, 2]", b'"q"', b'{"q": ["b"]}', b'{"q": {}}', b'{"q": "unknown"}', b"[" * 100_000],
)
def test_what_makes_no_sense_is_ignored_and_mended(content, cache):
    cache.mkdir()
    (cache / BOOK).write_bytes(content)
    assert choose() == ("b", ["a", "b", "c"])
    assert json.loads((cache / BOOK).read_text()) == {"q": "b"}


def test_an_answer_added_meanwhile_is_kept(cache):
    choose("first")
    (cache / BOOK).write_text(json.dumps({"first": "b", "theirs": "c"}))
    choose("second")
    assert json.loads((cache / BOOK).read_text()) == {"first": "b", "second": "b", "theirs": "c"}
    assert choose("theirs") == ("c", [])


def test_what_was_taken_stays_whatever_the_file_says(cache):
    choose()
    (cache / BOOK).write_text(json.dumps({"q": "c"}))
    assert choose() == ("b", [])
    restart()
    assert choose() == ("c", [])


def test_many_writers_leave_whole_files(cache):
    code = (
        "import sys; from fulmen.ops.gpu import tuning\n"
        "for i in range(40): tuning.choose(f'{sys.argv[1]} {i}', {'a': 1, 'b': 0}, float, book=sys.argv[2])"
    )
    commands = [[sys.executable, "-W", "error", "-c", code, str(n), BOOK] for n in range(3)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    while any(process.poll() is None for process in processes):
        if (cache / BOOK).exists():
            assert set(json.loads((cache / BOOK).read_text()).values()) == {"b"}
    assert [(p.communicate()[1], p.returncode) for p in processes] == [("", 0)] * 3
    assert [path.name for path in cache.iterdir()] == [BOOK]
    # The writers of one moment may have overwritten each other; the last answer of the last one is there.
    assert {f"{n} 39" for n in range(3)} & json.loads((cache / BOOK).read_text()).keys()


@pytest.mark.parametrize("obstacle", ["a file for a folder", "read-only", "full", "no home"])
def test_what_cannot_be_written_is_remembered_by_the_process_alone(obstacle, cache, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no home") if obstacle == "no home" else OSError(28, "No space left on device")

    if obstacle == "a file for a folder":
        cache.write_text("")
    elif obstacle == "read-only":
        cache.mkdir()
        cache.chmod(0o500)
        if os.access(cache, os.W_OK):  # root may write everywhere
            monkeypatch.setattr(tuning.tempfile, "mkdtemp", fail)
    elif obstacle == "full":
        monkeypatch.setattr(tuning.Path, "write_text", fail)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(tuning.Path, "home", fail)
    assert choose() == ("b", ["a", "b", "c"])
    assert choose() == ("b", [])
    assert not cache.is_dir() or list(cache.iterdir()) == []


def test_where_nothing_may_be_timed_the_first_is_taken_by_this_process_alone(cache):
    assert choose(seconds=None) == ("a", [])
    assert choose() == ("a", [])
    restart()
    assert choose() == ("b", ["a", "b", "c"])
    restart()
    assert choose(seconds=None) == ("b", [])


def test_without_memory_for_a_trial_the_first_is_taken_by_this_process_alone(cache):
    def no_memory(_):
        raise torch.OutOfMemoryError("no memory")

    take = functools.partial(tuning.choose, "q", {"a": 1, "b": 0}, book=BOOK)
    assert take(no_memory) == 1
    assert take(float) == 1
    restart()
    assert take(float) == 0


def test_what_cannot_run_is_never_taken(cache):
    assert choose(seconds={"a": math.inf, "b": math.inf, "c": 5.0})[0] == "c"
    assert choose("none", dict.fromkeys(SECONDS, math.inf))[0] == "a"
    assert "none" not in json.loads((cache / BOOK).read_text())


def test_a_book_is_for_one_gpu_one_source_and_these_versions(tmp_path, monkeypatch):
    source = tmp_path / "kernels.py"
    source.write_text("one")
    name = functools.partial(tuning.book_name, source=source)
    first = name("H100")
    assert name("H100") == first
    assert name("H200") != first
    for module in (tuning.torch, tuning.triton):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0")
            assert name("H100") != first
    source.write_text("two")
    assert name("H100") != first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's clock")
def test_the_gpus_clock():
    few, many = (torch.randn(n, n, device="cuda") for n in (256, 4096))
    assert 0 < tuning.gpu_seconds(lambda: few @ few) < tuning.gpu_seconds(lambda: many @ many) < 1
