"""`fulmen convert` and `fulmen make-tiny`."""

import json

from tests.cli.commands import assert_refused


class TestCheckpoints:
    def test_make_tiny_and_convert(self, fulmen, folder):
        code, out, _ = fulmen("make-tiny", "small", "--dialect", "transformers")
        assert (code, out) == (0, "wrote small in the transformers dialect\n")
        code, out, _ = fulmen("convert", "small", "other", "--dialect", "original", "--dtype", "bfloat16")
        assert (code, out) == (0, "wrote other in the original dialect\n")
        assert json.loads((folder / "other/config.json").read_text())["model_type"] == "minimax_text_01"
        greedy = ("-p", "attention", "--temperature", 0, "--max-tokens", 8)
        assert fulmen("generate", "other", *greedy) == fulmen("generate", "small", *greedy)
        # Half of a head rotated, as make-tiny writes the original dialect, cannot be said in the other.
        assert fulmen("make-tiny", "released")[0] == 0
        result = fulmen("convert", "released", "third", "--dialect", "transformers")
        assert_refused(result, "the transformers dialect cannot hold rotary_dim 32")
        assert not (folder / "third").exists()

    def test_a_run_can_be_converted(self, fulmen, finished, folder):
        assert fulmen("convert", finished, "copy", "--dialect", "transformers")[0] == 0
        assert json.loads((folder / "copy/generation_config.json").read_text())["eos_token_id"] == 288
        greedy = ("-p", "keys", "--temperature", 0, "--max-tokens", 8)
        assert fulmen("generate", "copy", *greedy) == fulmen("generate", finished, *greedy)
