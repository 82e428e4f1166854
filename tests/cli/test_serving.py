"""`fulmen serve`, before and after it serves."""

import re
import shutil
import socket

import pytest
from tests.cli.commands import assert_refused, ended

from fulmen.cli import serving


class TestServe:
    """What keeps a server from its start; tests/serve/test_server.py has what happens then."""

    @pytest.mark.parametrize("state", ["listens", "loads"])
    def test_a_port_that_is_taken(self, fulmen, finished, state):
        with socket.socket() if state == "listens" else serving._listen("127.0.0.1", 0) as other:
            if state == "listens":
                other.bind(("127.0.0.1", 0))
                other.listen()
            port = other.getsockname()[1]
            result = fulmen("serve", finished, "--port", port)
        assert not assert_refused(result, f"cannot listen at 127.0.0.1:{port}: [Errno", "give another --host or --port")

    def test_a_run_that_has_not_ended(self, fulmen, finished, folder):
        shutil.copytree(finished, "run", ignore=shutil.ignore_patterns("checkpoint"))
        assert_refused(fulmen("serve", "run", "--port", 0), "run is a training run that has not ended")

    def test_memory_that_is_too_little_is_refused_with_what_would_do(self, fulmen, finished, monkeypatch):
        """The numbers that the first refusal names are right, the flag too."""
        monkeypatch.setattr(serving, "_run", ended)
        result = fulmen("serve", finished, "--port", 0, "--memory", 0.0005)
        assert not assert_refused(result, "500.0 kB of memory are not enough for")
        enough = float(re.search(r": ([\d.]+) MB are$", result[2])[1])
        assert fulmen("serve", finished, "--port", 0, "--memory", f"{enough / 1000:.6f}")[0] == 0
        assert fulmen("serve", finished, "--port", 0, "--memory", f"{(enough - 0.1) / 1000:.6f}")[0] == 2

    def test_a_context_that_is_too_long_is_refused_with_the_one_that_would_do(self, fulmen):
        plan = ("plan", "tiny", "--memory", 0.05, "--chunk-tokens", 64)
        result = fulmen(*plan, "--max-context", 8192)
        assert not assert_refused(result, "8192 tokens do not fit into 45.0 MB", " would; give that as --max-context")
        fitting = int(re.search(r": (\d+) would", result[2])[1])
        code, out, _ = fulmen(*plan, "--max-context", fitting)
        assert (code, re.search(r"longest sequence +(\d+)", out)[1]) == (0, str(fitting))
        assert fulmen(*plan, "--max-context", fitting + 1)[0] == 2
