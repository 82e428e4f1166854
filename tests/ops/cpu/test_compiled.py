"""The library is built once and kept, by two processes at once too, and its absence costs speed and one warning."""

import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fulmen.ops import cpu
from fulmen.ops.cpu import compiled
from fulmen.ops.linear import linear

CAN_BUILD = any(map(shutil.which, compiled.COMPILERS))
needs_compiler = pytest.mark.skipif(not CAN_BUILD, reason="there is no C compiler here")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.load.cache_clear()
    yield tmp_path / "fulmen"
    compiled.load.cache_clear()


def works() -> bool:
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with torch.no_grad():
        return torch.allclose(cpu.linear(x, weight), x @ weight.T, atol=1e-5)


@needs_compiler
def test_built_once_and_kept(cache):
    assert works()
    (built,) = cache.iterdir()
    before = built.stat().st_mtime_ns
    compiled.load.cache_clear()
    assert works()
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [before]


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"no library", "half", "one bit"])
def test_a_damaged_library_is_built_anew(content, cache, monkeypatch):
    # Built and not opened: what a process has opened cannot be damaged safely.
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_open", lambda path: None)
        compiled.load()
    compiled.load.cache_clear()
    (built,) = cache.iterdir()
    good = built.read_bytes()
    flipped = good[:5000] + bytes([good[5000] ^ 1]) + good[5001:]
    built.write_bytes({"half": good[: len(good) // 2], "one bit": flipped}.get(content, content))
    assert works()
    content = built.read_bytes()
    assert hashlib.sha256(content[: -compiled.DIGEST]).digest() == content[-compiled.DIGEST :]


@needs_compiler
def test_two_processes_at_once(cache):
    code = "from fulmen.ops import cpu; assert cpu.load() is not None"
    command = [sys.executable, "-W", "error", "-c", code]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(p.communicate()[1], p.returncode) for p in processes] == [("", 0)] * 2
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def computes_without_the_library_and_warns_once(match: str) -> None:
    x, weight = torch.randn(2, 3), torch.randn(4, 3)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=match) as seen:
            first = linear(x, weight)
        assert len(seen) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = linear(x, weight)
    assert torch.equal(first, torch.nn.functional.linear(x, weight))
    assert torch.equal(first, second)


def test_without_a_compiler(cache, monkeypatch):
    monkeypatch.setenv("PATH", str(cache))
    computes_without_the_library_and_warns_once("no C compiler on the PATH")


def fake_compiler(folder: Path, monkeypatch, script: str) -> None:
    folder.mkdir()
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_with_a_compiler_that_fails(cache, tmp_path, monkeypatch):
    fake_compiler(tmp_path / "bin", monkeypatch, "echo 'no licence today' >&2; exit 1")
    computes_without_the_library_and_warns_once("no licence today")


def test_where_the_cache_cannot_be_written(cache, tmp_path, monkeypatch):
    cache.write_text("a file, where a folder should be")
    computes_without_the_library_and_warns_once("fulmen")


@needs_compiler
def test_a_compiler_without_openmp_builds_for_one_thread(cache, tmp_path, monkeypatch):
    real = shutil.which("cc") or shutil.which("gcc")
    script = f'case "$*" in *-fopenmp*) echo "no OpenMP" >&2; exit 1;; esac; exec {real} "$@"'
    fake_compiler(tmp_path / "bin", monkeypatch, script)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works()


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_one_openmp_in_the_process():
    code = """
import torch
from fulmen.ops import cpu

with torch.no_grad():
    cpu.linear(torch.randn(8, 512), torch.randn(512, 512))
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "iomp" in line}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 1
