"""The command as a whole: words that it does not know, its help, readers that have gone."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.commands import VERBS, assert_refused, files, start

from fulmen.cli import _parser


class TestArguments:
    @pytest.mark.parametrize("verb", VERBS)
    def test_help_has_an_example_that_parses(self, fulmen, verb):
        code, out, err = fulmen(verb, "--help")
        assert (code, err) == (0, "")
        example = out.split("example:\n")[1].strip()
        assert "\n" not in example
        program, *arguments = shlex.split(example)
        assert (program, arguments[0]) == ("fulmen", verb)
        _parser().parse_args(arguments)

    def test_help_names_every_verb(self, fulmen):
        code, out, _ = fulmen("--help")
        assert code == 0
        assert all(re.search(rf"^ +{verb} +\w", out, re.MULTILINE) for verb in VERBS)

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            ("", "the following arguments are required: VERB"),
            ("trian x", "invalid choice: 'trian'"),
            ("train", "the following arguments are required: recipe"),
            ("train recipe.toml --steps 3", "unrecognized arguments: --steps 3"),
            ("generate run --max-tokens many", "argument --max-tokens: invalid int value: 'many'"),
            ("generate run -p x --dtype int4", "argument --dtype: invalid choice: 'int4'"),
            ("generate run -p x --max-tokens 0", "max_tokens must be at least 1, got 0"),
            ("generate run -p x --temperature -1", "temperature must be 0 or more, got -1.0"),
            ("generate run -p x --temperature nan", "temperature must be 0 or more, got nan"),
            ("generate run -p x --top-k -1", "top_k must be 0 or more, got -1"),
            ("generate run -p x --top-p 1.5", "top_p must be above 0 and at most 1, got 1.5"),
            ("generate run -p x --stop ''", "a stop string must not be empty"),
            ("generate run -p x --seed -1", "seed must be at least 0"),
            ("generate run -p x --device gpu", "device 'gpu' cannot be used here"),
            ("generate run -p x", "there is no config.json in run: name the folder of a checkpoint"),
            ("chat run", "there is no config.json in run: name the folder of a checkpoint"),
            ("info nothing", "nothing is neither a folder nor a named size (tiny, 70m"),
            ("info ..", "there is no config.json in ..: name the folder of a checkpoint"),
            ("info tiny --context 0", "argument --context: must be an integer of at least 1, got '0'"),
            ("info tiny --context -5", "argument --context: must be an integer of at least 1, got '-5'"),
            ("info tiny --batch 0", "argument --batch: must be an integer of at least 1, got '0'"),
            ("info tiny --batch 1.5", "argument --batch: must be an integer of at least 1, got '1.5'"),
            ("info tiny --dtype int3", "argument --dtype: invalid choice: 'int3'"),
            ("serve", "the following arguments are required: path"),
            ("serve run --port 0", "there is no config.json in run: name the folder of a checkpoint"),
            ("serve .. --port 0", "there is no config.json in ..: name the folder of a checkpoint"),
            ("serve text.txt --port 0", "there is no config.json in text.txt: name the folder of a checkpoint"),
            ("serve run --port x", "argument --port: must be a number from 0 to 65535, got 'x'"),
            ("serve run --port -1", "argument --port: must be a number from 0 to 65535, got '-1'"),
            ("serve run --port 65536", "argument --port: must be a number from 0 to 65535, got '65536'"),
            ("serve run --port 1.5", "argument --port: must be a number from 0 to 65535, got '1.5'"),
            ("serve run --host 192.0.2.1", "cannot listen at 192.0.2.1:8000: [Errno"),
            ("serve run --host ä..b", "cannot listen at ä..b:8000: encoding of hostname failed"),
            ("serve run --host ''", "argument --host: must not be empty"),
            ("serve run --api-key ''", "argument --api-key: must not be empty"),
            ("serve run --api-key 'secret '", "argument --api-key: must not be empty, or begin or end with a blank"),
            ("serve run --port 0 --memory 0", "argument --memory: must be a number from 1e-09 to 1e+09, got '0'"),
            ("serve run --port 0 --memory -1", "argument --memory: must be a number from 1e-09 to 1e+09, got '-1'"),
            ("serve run --port 0 --memory nan", "argument --memory: must be a number from 1e-09 to 1e+09, got 'nan'"),
            ("serve run --port 0 --memory inf", "argument --memory: must be a number from 1e-09 to 1e+09, got 'inf'"),
            ("serve run --port 0 --memory 8GB", "argument --memory: must be a number from 1e-09 to 1e+09, got '8GB'"),
            ("serve run --port 0 --grace -1", "argument --grace: must be a number from 0 to 1e+06, got '-1'"),
            ("serve run --port 0 --grace nan", "argument --grace: must be a number from 0 to 1e+06, got 'nan'"),
            ("serve run --port 0 --max-waiting -1", "max_waiting must be 0 or more, got -1"),
            ("serve run --port 0 --max-context 0", "argument --max-context: must be an integer of at least 1, got '0'"),
            ("serve run --port 0 --device gpu", "device 'gpu' cannot be used here"),
            ("serve run --port 0 --dtype int3", "argument --dtype: invalid choice: 'int3'"),
            ("plan tiny", "the following arguments are required: --memory"),
            ("plan nothing --memory 1", "nothing is neither a folder nor a named size (tiny, 70m"),
            ("plan .. --memory 1", "there is no config.json in ..: name the folder of a checkpoint"),
            ("plan tiny --memory nan", "argument --memory: must be a number from 1e-09 to 1e+09, got 'nan'"),
            ("plan tiny --memory 1e300", "argument --memory: must be a number from 1e-09 to 1e+09, got '1e300'"),
            ("plan tiny --memory 1 --share 0", "--share must be above 0 and at most 1, got 0.0"),
            ("plan tiny --memory 1 --share 1.5", "--share must be above 0 and at most 1, got 1.5"),
            ("plan tiny --memory 1 --share nan", "--share must be above 0 and at most 1, got nan"),
            ("plan tiny --memory 1 --share half", "argument --share: invalid float value: 'half'"),
            ("plan tiny --memory 1 --devices 0", "argument --devices: must be an integer of at least 1, got '0'"),
            ("plan tiny --memory 1 --max-context 9000", "max_context 9000 exceeds the model's 8192 positions"),
            ("plan tiny --memory 0.01", "9.0 MB of memory are not enough for 34.4 MB of weights"),
            ("plan tiny --memory 1 --context 512", "--context is of training: it needs --train"),
            ("plan tiny --machine H100 --devices 3", "4 heads cannot be split over 3 devices"),
            ("plan tiny --machine H101", "no machine named 'H101'; there are H100, H800"),
            ("plan tiny --train", "the following arguments are required with --train: --machine"),
            ("plan tiny --train --machine H100 --dtype int8", "--dtype is of serving: leave it out with --train"),
            ("plan tiny --train --machine H100 --mesh 4", "--mesh is find, or sizes of pp, dp, cp, tp"),
            ("plan tiny --train --machine H100 --mesh cp=x", "as pp=4,cp=2; got 'cp=x'"),
            ("plan tiny --train --machine H100 --mesh tp=2", "tp 2 is 2 ranks, and there are 1: change mesh.pp"),
            ("plan tiny --train --machine H100 --batch-tokens 100", "100 tokens are no multiple of 8192"),
            ("plan tiny --train --machine H100 --memory 0.01", "on 1 GPUs fits into 9.0 MB: the least takes"),
            ("convert a b", "the following arguments are required: --dialect"),
            ("convert a b --dialect transformers", "there is no config.json in a: name the folder of a checkpoint"),
            ("make-tiny x --dialect new", "argument --dialect: invalid choice: 'new'"),
            ("make-tiny text.txt", "text.txt is a file: name a folder for the checkpoint"),
            ("make-tiny .", "which is no part of a checkpoint: choose another folder"),
            ("train missing.toml", "recipe missing.toml does not exist"),
            ("train quickstar", "recipe quickstar does not exist; did you mean quickstart?"),
            ("train .", "recipe . is a folder, not a recipe"),
            ("train recipe.toml --set steps", "override 'steps' must read section.key=value"),
            ("train recipe.toml --set train.sed=3", "unknown key train.sed; did you mean train.seed?"),
            ("train recipe.toml --set schedule.steps=many", "schedule.steps must be an integer, got 'many'"),
            ("train recipe.toml --set optimizer.learning_rate=-1", "optimizer: learning_rate must be above 0, got -1"),
            ("train broken.toml", "recipe broken.toml is not valid TOML"),
            ("train latin.toml", "recipe latin.toml is not UTF-8 (byte 2)"),
            ("train text.txt", "recipe text.txt is not valid TOML"),
            ("train recipe.toml --set data.sources=['latin.txt']", "latin.txt is not UTF-8 at byte offset 6 (0xfc)"),
            ("train recipe.toml --set data.sources=['empty.txt']", "the corpus is empty"),
            ("train recipe.toml --set data.sources=[]", "the corpus is empty"),
            ("train recipe.toml --set data.sources=['*.md']", "no file matches '*.md'"),
            ("quickstart --set schedule.steps=0", "schedule: steps must be at least 1, got 0"),
        ],
    )
    def test_wrong_arguments_are_one_line_and_write_nothing(self, fulmen, folder, arguments, part):
        (folder / "broken.toml").write_text("[data\n")
        (folder / "latin.toml").write_bytes("# ü".encode("latin-1"))
        (folder / "latin.txt").write_bytes("Viel für".encode("latin-1"))
        (folder / "empty.txt").write_text("")
        before = files(folder)
        words = (
            [word.replace("['", '["').replace("']", '"]') for word in arguments.split()] if "[" in arguments else None
        )
        out = assert_refused(fulmen(*(words or shlex.split(arguments))), part)
        assert not out or arguments.startswith("quickstart")
        assert [file for file in files(folder) if file != "runs"] == before


def test_a_reader_that_has_gone():
    """`fulmen info tiny | head -0`: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start("info", "tiny", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.communicate()[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_terminal_that_lacks_the_letters(finished):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fulmen", "generate", finished, "-p", "für", "--max-tokens", "2"]
    result = subprocess.run(command, env=environment, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.startswith(b"f?r")


def test_help_needs_no_torch():
    """So that it answers at once."""
    script = "import sys; from fulmen.cli import _parser; _parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_examples_name_shipped_recipes():
    shipped = {path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.toml")}
    assert "quickstart" in shipped
