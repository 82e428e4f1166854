import json

import pytest

from fulmen.checkpoint import GenerationConfig, load_generation_config
from fulmen.config import UserError
from fulmen.data import Tokenizer

TOKENIZER = Tokenizer.train(["a text of a few words, words, words"], 262)


def write(folder, config, generation=None, tokenizer=None):
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer is not None:
        tokenizer.save(folder)
    return load_generation_config(folder)


def test_generation_config_comes_first(tmp_path):
    config = {"eos_token_id": 1, "bos_token_id": 2, "vocab_size": 200064}
    generation = {"eos_token_id": [3, 4], "bos_token_id": 5, "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    found = write(tmp_path, config, generation, TOKENIZER)
    assert found == GenerationConfig(eos_ids=(3, 4), bos_id=5, temperature=0.9, top_k=40, top_p=0.95)


def test_config_comes_second(tmp_path):
    config = {"eos_token_id": 1, "bos_token_id": 2, "vocab_size": 200064}
    assert write(tmp_path, config, {"eos_token_id": None}, TOKENIZER) == GenerationConfig(eos_ids=(1,), bos_id=2)


def test_the_tokenizer_comes_third(tmp_path):
    found = write(tmp_path, {"eos_token_id": None, "vocab_size": 200064}, tokenizer=TOKENIZER)
    assert found == GenerationConfig(eos_ids=(TOKENIZER.eos_id,), bos_id=TOKENIZER.bos_id)


def test_the_release_ends_with_200020(tmp_path):
    assert write(tmp_path, {"eos_token_id": None, "vocab_size": 200064}) == GenerationConfig(eos_ids=(200020,))


def test_nothing_is_known(tmp_path):
    assert write(tmp_path, {"vocab_size": 100}) == GenerationConfig()


@pytest.mark.parametrize("token", ["</s>", -1, True, [1, None]])
def test_a_token_that_is_no_id(tmp_path, token):
    with pytest.raises(UserError, match=r"a token id must be an integer >= 0, got"):
        write(tmp_path, {"eos_token_id": token})


def test_a_broken_file(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json is not JSON"):
        write(tmp_path, {})
