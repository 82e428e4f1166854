"""`fulmen generate`, `fulmen chat` and `fulmen info`."""

import io
import re
import shutil

import pytest
from tests.cli.commands import assert_refused, on_terminal

from fulmen.serve.sampling import Drawn


class TestGenerate:
    def test_the_prompt_and_what_follows(self, fulmen, finished):
        arguments = ("generate", finished, "--prompt", "keys and", "--max-tokens", 20, "--seed", 3)
        code, out, err = fulmen(*arguments)
        assert (code, err) == (0, "")
        assert out.startswith("keys and")
        assert out.endswith("\n")
        assert len(out) > len("keys and\n")
        assert fulmen(*arguments)[1] == out
        assert fulmen("generate", finished / "checkpoint", *arguments[2:])[1] == out

    def test_standard_input(self, fulmen, finished, stdin):
        stdin("keys für\n".encode())
        code, out, err = fulmen("generate", finished, "--max-tokens", 5)
        assert (code, err) == (0, "")
        assert out.startswith("keys für\n")

    def test_standard_input_that_is_not_utf_8(self, fulmen, finished, stdin):
        stdin(b"keys f\xfcr\n")
        out = assert_refused(fulmen("generate", finished), "the input is not UTF-8 at byte offset 6")
        assert out == ""

    def test_an_empty_prompt(self, fulmen, finished):
        code, out, _ = fulmen("generate", finished, "--prompt", "", "--max-tokens", 5, "--temperature", 0)
        assert code == 0
        assert out != "\n"

    def test_a_prompt_that_is_too_long(self, fulmen, finished):
        out = assert_refused(
            fulmen("generate", finished, "--prompt", "keys and values " * 100), "128 is the longest context here"
        )
        assert out == ""

    def test_a_stop_string(self, fulmen, finished):
        greedy = ("generate", finished, "--prompt", "keys and", "--temperature", 0, "--max-tokens", 30)
        answer = fulmen(*greedy)[1].removeprefix("keys and").removesuffix("\n")
        stop = answer[4:6]
        assert fulmen(*greedy, "--stop", stop)[1] == f"keys and{answer[: answer.index(stop)]}\n"

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_narrow_dtypes(self, fulmen, finished, dtype):
        assert fulmen("generate", finished, "-p", "keys", "--max-tokens", 5, "--dtype", dtype)[0] == 0

    def test_a_checkpoint_cut_short(self, fulmen, finished, tmp_path):
        shutil.copytree(finished / "checkpoint", tmp_path / "cut")
        weights = tmp_path / "cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        for verb in (("generate", tmp_path / "cut", "-p", "x"), ("chat", tmp_path / "cut")):
            assert_refused(fulmen(*verb), "model.safetensors is cut short or not safetensors", "get it again")
        (tmp_path / "cut" / "tokenizer.json").write_text("{")
        assert_refused(fulmen("generate", tmp_path / "cut", "-p", "x"), "tokenizer.json is not a readable tokenizer")
        (tmp_path / "cut" / "config.json").write_text("{")
        assert_refused(fulmen("info", tmp_path / "cut"), "config.json is not JSON")

    def test_ctrl_c_ends_the_line(self, fulmen, finished, monkeypatch):
        calls = []

        def sample(logits, draws):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return [Drawn(75)]

        monkeypatch.setattr("fulmen.serve.engine.sample", sample)
        code, out, err = fulmen("generate", finished, "-p", "keys")
        assert (code, err) == (130, "fulmen: interrupted\n")
        assert out.endswith("\n")


class TestChat:
    def chat(self, fulmen, stdin, finished, typed, *arguments):
        stdin(typed.encode())
        return fulmen("chat", finished, "--max-tokens", 6, "--temperature", 0, *arguments)

    def test_turns_go_on_until_the_input_ends(self, fulmen, finished, stdin):
        code, out, err = self.chat(fulmen, stdin, finished, "keys?\n\n  \nvalues?\n")
        assert (code, err) == (0, "")
        assert out.count("you: ") == 5
        assert out.count("ai: ") == 2
        assert out.endswith("you: \n")

    def test_exit_leaves(self, fulmen, finished, stdin):
        code, out, _ = self.chat(fulmen, stdin, finished, " /exit \nkeys?\n")
        assert (code, out) == (0, "you: ")

    def test_reset_forgets(self, fulmen, finished, stdin):
        def answers(typed):
            return re.findall(r"ai: (.*)", self.chat(fulmen, stdin, finished, typed, "--seed", "1")[1])

        once = answers("keys?\n")
        assert answers("keys?\n/reset\nkeys?\n") == once * 2
        assert answers("values and decay\n/reset\nkeys?\n")[1:] == once

    def test_the_system_message_counts(self, fulmen, finished, stdin):
        code, _, err = self.chat(fulmen, stdin, finished, "keys?\n", "--system", "Be short. " * 50)
        assert (code, err) == (0, "")
        out = self.chat(fulmen, stdin, finished, "keys?\n", "--system", "a " * 90)[1]
        assert "128 is the longest context here" in out

    def test_a_conversation_that_is_too_long_can_be_begun_anew(self, fulmen, finished, stdin):
        code, out, _ = self.chat(fulmen, stdin, finished, "a " * 200 + "\n/reset\nkeys?\n")
        assert code == 0
        refused, answered = re.findall(r"ai: (.*)", out)
        assert re.fullmatch(
            r"\[the prompt has \d+ tokens; 128 is the longest context here, .*; /reset starts anew\]", refused
        )
        assert answered

    def test_input_that_is_not_utf_8(self, fulmen, finished, monkeypatch):
        content = io.TextIOWrapper(io.BytesIO(b"f\xfcr\n"), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", content)
        assert_refused(fulmen("chat", finished), "the input is not UTF-8 at byte offset 1")

    def test_on_a_terminal(self, finished):
        """Ctrl-C leaves an answer and not the chat, Ctrl-D leaves the chat."""
        code, shown = on_terminal(
            ["chat", finished, "--temperature", 1, "--max-tokens", 100],
            [
                (b"you: ", b"keys and\n"),
                (b"ai: ", b"\x03"),
                (b"you: ", b"values?\n"),
                (b"ai: ", b""),
                (b"you: ", b"\x04"),
            ],
        )
        assert code == 0
        assert shown.count("ai: ") == 2
        assert "Traceback" not in shown


class TestInfo:
    @pytest.mark.parametrize("name", ["tiny", "70m", "160m", "410m", "1b", "3b", "7b", "minimax-text-01"])
    def test_named_sizes(self, fulmen, name):
        code, out, err = fulmen("info", name)
        assert (code, err) == (0, "")
        assert re.search(r"^parameters +[\d.]+ [MB] total, [\d.]+ [MB] active", out, re.MULTILINE)

    def test_the_published_size(self, fulmen):
        out = fulmen("info", "minimax-text-01", "--context", 1_000_000, "--dtype", "int8")[1]
        assert "456.1 B total, 45.9 B active" in out

    def test_a_run_and_its_checkpoint(self, fulmen, finished):
        code, out, _ = fulmen("info", finished)
        assert code == 0
        assert "2: 1 lightning, 1 softmax" in out
        assert fulmen("info", finished / "checkpoint")[1] == out

    def test_more_context_and_batch_take_more(self, fulmen):
        def cached(*arguments):
            return float(re.search(r"keys and values +([\d.]+) MB", fulmen("info", "tiny", *arguments)[1])[1])

        assert cached("--context", 32768) == pytest.approx(4 * cached("--context", 8192), rel=0.02)
        assert cached("--batch", 4) == pytest.approx(4 * cached(), rel=0.02)
