import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from fulmen.checkpoint import load_config, load_model, save_model
from fulmen.config import UserError
from fulmen.data import Tokenizer

TOKENIZER = Tokenizer.train(["a text of a few words, words, words"], 262)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_shards_keep_their_size_and_the_index_names_all(model, sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in model.parameters())
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    found = {}
    for name in files:
        with safe_open(sharded / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) <= 20_000  # noqa: SIM118
            found |= dict.fromkeys(file.keys(), name)
    assert found == index["weight_map"]


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(model, tmp_path):
    save_model(model, tmp_path / "out", max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 83
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, model.lm_head.weight)


def test_original_to_transformers_to_original_is_bit_equal(model, tmp_path):
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        folders = [tmp_path / f"{name}-{step}" for step in range(3)]
        save_model(model.to(dtype), folders[0], "original", eos_id=5)
        save_model(load_model(folders[0], dtype=dtype), folders[1], "transformers", eos_id=5)
        save_model(load_model(folders[1], dtype=dtype), folders[2], "original", eos_id=5)
        assert contents(folders[0]) == contents(folders[2])
        assert contents(folders[0])["model.safetensors"] == contents(folders[1])["model.safetensors"]
        assert contents(folders[0])["config.json"] != contents(folders[1])["config.json"]


def test_files_are_readable_like_any_other(single, tmp_path):
    (tmp_path / "other").write_text("")
    modes = {file.stat().st_mode for file in single.iterdir()}
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_tokens(model, random_model, config, tmp_path):
    save_model(model, tmp_path / "out", eos_id=7, bos_id=6)
    for file in ("config.json", "generation_config.json"):
        keys = json.loads((tmp_path / "out" / file).read_text())
        assert (keys["bos_token_id"], keys["eos_token_id"]) == (6, 7)


def test_tokenizer_is_saved_and_gives_the_tokens(random_model, config, tmp_path):
    model = random_model(replace(config, vocab_size=270))
    save_model(model, tmp_path / "out", tokenizer=TOKENIZER)
    assert Tokenizer.load(tmp_path / "out").fingerprint == TOKENIZER.fingerprint
    keys = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (keys["bos_token_id"], keys["eos_token_id"]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
    save_model(model, tmp_path / "out", tokenizer=TOKENIZER, eos_id=9)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 9


def test_a_tokenizer_larger_than_the_model(model, tmp_path):
    with pytest.raises(UserError, match=r"the tokenizer has 262 entries, the model only 61"):
        save_model(model, tmp_path / "out", tokenizer=TOKENIZER)
    assert not (tmp_path / "out").exists()


def test_no_room_in_a_shard(model, tmp_path):
    with pytest.raises(UserError, match=r"max_shard_bytes must be at least 1, got 0"):
        save_model(model, tmp_path / "out", max_shard_bytes=0)


def test_a_model_that_the_dialect_cannot_hold_leaves_nothing(random_model, config, tmp_path):
    model = random_model(replace(config, rotary_dim=4))
    with pytest.raises(UserError, match=r"rotary_dim 4"):
        save_model(model, tmp_path / "out", "transformers")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(model, single, tmp_path):
    """The limit on a file's size stands for the end of the disk: the system refuses the write the same way."""
    script = """
        import resource, sys
        from fulmen.checkpoint import load_model, save_model
        from fulmen.config import UserError

        old, *paths = sys.argv[1:]
        model = load_model(old)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        for path in paths:
            try:
                save_model(model, path, max_shard_bytes=100_000)
            except UserError as error:
                print(error)
    """
    before = contents(single)
    (tmp_path / "parent").mkdir()
    new = tmp_path / "parent" / "new"
    command = [sys.executable, "-c", textwrap.dedent(script), single, single, new]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 2
    for line, path in zip(lines, (single, new), strict=True):
        assert line.startswith(f"cannot write the checkpoint {path}: ")
        assert "File too large" in line
    assert contents(single) == before
    assert list((tmp_path / "parent").iterdir()) == []
    assert load_config(single) == model.config
