"""docs/serve.md says what the code does: every setting with its default, and the example runs."""

import dataclasses
import json
import re
from pathlib import Path

from fulmen.checkpoint import save_model
from fulmen.cli import _parser
from fulmen.serve import SamplingParams
from fulmen.serve.generate import PROMPT_PIECE

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()


def test_settings_and_defaults():
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+) \| ", PAGE.split("## How an answer is drawn")[1].split("\n#")[0], re.MULTILINE
    )
    documented = {key: None if default == "none" else json.loads(default.strip("`")) for key, default in rows}
    fields = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert documented == {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    # The command has the same.
    for verb in ("generate", "chat"):
        arguments = vars(_parser().parse_args([verb, "run"]))
        assert {key: arguments[key] for key in documented} == documented


def test_the_size_of_a_prompts_pieces():
    assert f"processed {PROMPT_PIECE} tokens at a time" in PAGE


def test_example(tmp_path, monkeypatch, capsys, model, tokenizer):
    monkeypatch.chdir(tmp_path)
    save_model(model, tmp_path / "runs" / "quickstart" / "checkpoint", tokenizer=tokenizer)
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], {})
    out = capsys.readouterr().out
    assert "def main(" not in out
    assert re.search(r"\(\d+(, \d+)*,?\) (stop|length)\n", out)
