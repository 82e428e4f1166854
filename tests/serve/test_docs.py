"""docs/serve.md says what the code does: every setting with its default, the plan, and the example runs."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

from fulmen.checkpoint import save_model
from fulmen.cli import _parser
from fulmen.serve import SamplingParams

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
BY_PYTHON = {"logit_bias", "stop_tokens", "n", "logprobs", "ignore_eos", "structure"}


def test_settings_and_defaults():
    rows = re.findall(
        r"^\| `(\w+)` \| (\S+) \| ", PAGE.split("## How an answer is drawn")[1].split("\n#")[0], re.MULTILINE
    )
    documented = {key: None if default == "none" else json.loads(default.strip("`")) for key, default in rows}
    fields = {field.name: field.default for field in dataclasses.fields(SamplingParams) if field.name not in BY_PYTHON}
    assert documented == {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    assert all(f"`{name}`" in PAGE for name in BY_PYTHON)
    # The command has the same.
    for verb in ("generate", "chat"):
        arguments = vars(_parser().parse_args([verb, "run"]))
        assert {key: arguments[key] for key in documented} == documented


def test_the_plan(fulmen):
    command, table = re.search(r"\$ fulmen (plan .*)\n((?:.+\n)+)```", PAGE).groups()
    assert fulmen(*shlex.split(command))[1] == table


def test_example(tmp_path, monkeypatch, capsys, model, tokenizer):
    monkeypatch.chdir(tmp_path)
    save_model(model, tmp_path / "runs" / "quickstart" / "checkpoint", tokenizer=tokenizer)
    exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], {})
    out = capsys.readouterr().out
    assert re.search(r"\(\d+(, \d+)*,?\) (stop|length)\n", out)
    assert re.search(r"^[0-9]{3}$", out, re.MULTILINE)
