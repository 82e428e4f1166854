"""The benchmarks' own rules: what is wrong is not timed, what cannot run here says so. Figures are nobody's test."""

import importlib
import json

import pytest
import torch

from fulmen import bench
from fulmen.config import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [name for name in bench.NAMES if name != "cpu"])
def test_a_gpu_is_missed_by_name(fulmen, name):
    code, out, err = fulmen("bench", name)
    assert (code, out) == (2, "")
    assert (
        err == f"fulmen: error: fulmen bench {name} needs a CUDA device, and there is none; fulmen bench cpu does not\n"
    )


def test_a_table_is_missed_by_name(fulmen):
    code, _, err = fulmen("bench", "cpu", "--only", "nothing")
    assert code == 2
    assert "there are train, decode, memory" in err


def test_every_benchmark_has_tables(gpu_device):
    for name in bench.NAMES:
        tables = importlib.import_module(f"fulmen.bench.{name}").TABLES
        assert tables
        assert all(callable(table) for table in tables.values())


def test_results_are_kept_table_by_table(monkeypatch, tmp_path, capsys):
    from fulmen.bench import cpu

    def broken():
        raise UserError("broken")

    monkeypatch.setattr(cpu, "TABLES", {"one": lambda: {"value": 1}, "two": broken})
    with pytest.raises(UserError, match="broken"):
        bench.run("cpu", path=tmp_path / "deep" / "results.json")
    written = json.loads((tmp_path / "deep" / "results.json").read_text())
    assert written["one"] == {"value": 1}
    assert written["machine"]["torch"] == torch.__version__
    assert capsys.readouterr().out.startswith("cpu=")


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_what_is_wrong_is_not_timed(error, gpu_device):
    from fulmen.bench.gpu import require

    require({"out": 0.01}, 0.01)
    with pytest.raises(UserError, match="nothing is timed"):
        require({"out": 0.0, "d_q": error}, 0.01)


def test_bytes_of_a_step_are_those_of_the_model(gpu_device):
    from fulmen.bench.model import CONFIG, bytes_moved

    count = CONFIG.count_parameters()
    one = 2 * (count.active + CONFIG.vocab_size * CONFIG.hidden_size)
    state = 2 * CONFIG.layers.count("L") * CONFIG.num_heads * CONFIG.head_dim**2 * 4
    assert bytes_moved(1) == pytest.approx(one + state, rel=0.01)
    assert bytes_moved(64) < 2 * count.total + 64 * 2 * state
