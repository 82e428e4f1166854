"""The benchmarks' own rules: what is wrong is not timed, what cannot run here says so. Figures are nobody's test."""

import importlib
import json

import pytest
import torch

from fulmen import bench
from fulmen.config import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [name for name in bench.NAMES if name not in bench.ANYWHERE])
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


def test_a_table_that_fails_does_not_take_the_next_along(monkeypatch, tmp_path, capsys):
    from fulmen.bench import cpu

    tables = {"one": lambda: 1 // 0, "two": lambda: {"value": 2}}
    monkeypatch.setattr(cpu, "TABLES", tables)
    with pytest.raises(UserError, match="table one: ZeroDivisionError"):
        bench.run("cpu", path=tmp_path / "results.json")
    assert "1 // 0" in capsys.readouterr().err  # the traceback
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["two"] == {"value": 2}
    assert "one" not in written


def test_extra_tables_run_only_by_name(monkeypatch):
    from fulmen.bench import cpu

    ran = []
    monkeypatch.setattr(cpu, "TABLES", {"one": lambda: ran.append("one")})
    monkeypatch.setattr(cpu, "EXTRA_TABLES", {"long": lambda: ran.append("long")}, raising=False)
    bench.run("cpu")
    bench.run("cpu", "long")
    assert ran == ["one", "long"]
    with pytest.raises(UserError, match="there are one, long"):
        bench.run("cpu", "nothing")


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


def test_a_peers_fault_is_one_line_of_text(gpu_device):
    from fulmen.bench.gpu import OUT_OF_MEMORY, attempt

    def fail(error):
        raise error

    assert attempt(lambda: 3.0) == 3.0
    assert attempt(lambda: fail(torch.OutOfMemoryError("a lot"))) == OUT_OF_MEMORY
    assert attempt(lambda: fail(RuntimeError("no\nkernel"))) == "RuntimeError: no"
    assert attempt(lambda: fail(ValueError())) == "ValueError:"


def test_memory_of_what_failed_is_free(gpu_device):
    import weakref

    from fulmen.bench.gpu import attempt

    held = []

    def fail():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise RuntimeError("no kernel")

    attempt(fail)
    assert held[0]() is None


def test_ratios_are_of_what_was_measured(gpu_device):
    from fulmen.bench.lightning import ratios, spread

    line = {"floor forward": 2.0, "ours forward": 3.0, "fla forward": 7.5, "ours training": 4.0, "fla training": 10.0}
    assert ratios(line) == {"fla / ours forward": 2.5, "fla / ours training": 2.5, "ours / floor forward": 1.5}
    assert ratios(line | {"fla training": "out of memory"}).keys() == {"fla / ours forward", "ours / floor forward"}
    assert ratios({"ours forward": 1.0}) == {}
    assert spread([8.0, 10.0, 9.0]) == pytest.approx(0.2)
    assert spread([]) is None


def test_flat_rates_leave_out_lengths_that_failed(gpu_device, monkeypatch):
    from fulmen.bench import lightning

    def rate(length):
        if length == 3:
            raise torch.OutOfMemoryError("too long")
        return 10.0 * length

    monkeypatch.setattr(lightning, "LONG_LENGTHS", (1, 2, 3))
    assert lightning.flat_rates(rate) == {"1": 10.0, "2": 20.0, "3": "out of memory", "spread": 0.5}


def test_what_is_on_top_of_the_products(gpu_device):
    from fulmen.bench.experts import summary

    forward = {"layer": 15.0, "products": 10.0, "activation": 3.0}
    training = {"layer training": 50.0, "products training": 40.0, "activation training": 6.0}
    line = summary(forward | training, 4e12)
    assert line["on top"] == pytest.approx(0.2)
    assert line["on top with activation"] == pytest.approx(0.5)
    assert line["on top training"] == pytest.approx(0.1)
    assert line["on top with activation training"] == pytest.approx(0.25)
    assert line["TFLOP/s of the products"] == pytest.approx(400)
    assert line["TFLOP/s of the products training"] == pytest.approx(300)


def test_bare_products_are_of_the_same_routing(gpu_device, monkeypatch):
    import torch.nn.functional as F

    from fulmen.bench import experts
    from fulmen.ops.experts import route
    from fulmen.ops.experts.grouped import _plan

    for name, value in dict(EXPERTS=4, HIDDEN=32, WIDTH=24).items():
        monkeypatch.setattr(experts, name, value)
    plan = _plan(route(torch.randn(50, 4), 2), torch.bfloat16)
    w13, w2 = torch.randn(4, 48, 32).bfloat16(), torch.randn(4, 32, 24).bfloat16()
    seen, product = [], F.grouped_mm
    monkeypatch.setattr(
        F, "grouped_mm", lambda a, b, *, offs: (seen.append((len(a), offs)), product(a, b, offs=offs))[1]
    )
    calls = experts.bare_calls(plan, w13, w2)
    rows = len(plan.tokens)
    calls["products"]()
    calls["products training"]()
    # Forward twice, then the gradients of activation, w2, w13 and x.
    assert [length for length, _ in seen] == [rows, rows, rows, rows, rows, 32, 48, rows]
    assert all(ends is plan.ends for _, ends in seen)
    calls["activation"]()
    calls["activation training"]()
    assert len(seen) == 8
